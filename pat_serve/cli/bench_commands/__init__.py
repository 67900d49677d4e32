"""The commands of pat-bench, one file each."""

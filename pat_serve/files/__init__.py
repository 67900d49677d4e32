"""Files and folders: written whole or not at all, read as their authors meant them."""

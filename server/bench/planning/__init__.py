"""The number of engines that a traffic needs: a queueing simulation on measured step times."""

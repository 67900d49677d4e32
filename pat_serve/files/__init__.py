"""Files and folders. They are written whole or not at all, and read as their authors meant them."""

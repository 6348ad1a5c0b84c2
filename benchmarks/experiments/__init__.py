"""An experiment a file; its name is that of the file, what it is says ``EXPERIMENT``."""

"""Which kernels compute on a device, and how exactly: leaves that import nothing of the package."""

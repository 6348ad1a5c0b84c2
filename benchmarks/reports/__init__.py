"""Tables and plots of README and documentation, made from the result files."""

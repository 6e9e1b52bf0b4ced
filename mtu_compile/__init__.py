"""mtu-compile: multi-task upcycled diffusion UNets, compiled for edge devices."""

__version__ = "0.1.0"

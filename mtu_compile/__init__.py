"""mtu-compile: multi-task upcycled diffusion UNets, compiled for edge devices."""

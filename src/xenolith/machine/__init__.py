"""The bare machine: memory by frame, a clock, and the engines that execute ring-3 code."""

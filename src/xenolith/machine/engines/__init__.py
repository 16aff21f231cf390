"""Engines: what executes ring-3 x86-64 code under real page tables and hands every trap to Python."""

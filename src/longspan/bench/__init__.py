"""Measuring: timing, memory, where it ran. No numbers without their origin."""

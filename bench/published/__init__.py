"""The published way of doing each step, written from its description: what every measurement is compared with."""

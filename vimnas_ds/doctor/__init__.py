"""Is everything here, and is it fast? Checks of the environment, each in a process of its own."""

"""Speed and memory, and checks that take too long for tests; each a module with a command line."""

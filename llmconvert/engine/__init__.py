"""From a plan to a published directory: execute, journal, publish, inspect. Knows regions of files, not models."""

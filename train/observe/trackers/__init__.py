"""Where curves are shown beside the run's own files: one file per tracker, each the door to its vendor."""

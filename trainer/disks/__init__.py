"""The disks that a run's directory lies on, one or one of each host, and what is carried between them."""

"""What preparing leaves on the disk: shards of latents, references to the user's own files, snapshots."""

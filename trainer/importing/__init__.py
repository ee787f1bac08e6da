"""Coming over from other trainers: their commands and settings as this one's configuration."""

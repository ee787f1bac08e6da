"""The machine beside the training: its cards, memory and disks, watched from the command's parent process. No torch."""

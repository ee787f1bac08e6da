"""SDXL on the disk: folders, single files and pickles, their headers and names; without torch where it can be."""

"""A prepared set as one page to look at: what is gathered for it, and how it is drawn."""

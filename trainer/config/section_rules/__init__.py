"""Rules between fields, a module for each section that has many."""

"""The seam between requests and steps: turns requests into batches and samples into text."""

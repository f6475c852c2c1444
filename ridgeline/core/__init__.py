"""The ground floor: types every other package shares. Imports nothing internal."""

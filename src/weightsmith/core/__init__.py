"""The ground floor: what every technique stands on. It knows torch and nothing else of this package."""

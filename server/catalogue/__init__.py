"""The catalogue: tenants, their API keys and the audit log, in SQLite or PostgreSQL."""

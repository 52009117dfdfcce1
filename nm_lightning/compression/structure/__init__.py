"""The bottom room: sites, what an operation does, the plan, and the only code that changes a network."""

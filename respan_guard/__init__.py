"""Rate limits, USD budgets and exact usage records per customer, for ASGI apps that call LLMs."""

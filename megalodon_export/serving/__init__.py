"""A server that speaks OpenAI's API: the engine, the states that it keeps, and the routes over HTTP."""

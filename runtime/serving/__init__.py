"""A model for others to call: requests and answers as OpenAI's API has them, over HTTP."""

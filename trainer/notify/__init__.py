"""Messages to whoever is away: what is sent, how, and a thread that does so beside all else. Free of torch."""

"""How ranks find each other, and agree before there is a communicator."""

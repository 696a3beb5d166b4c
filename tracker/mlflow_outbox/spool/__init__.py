"""The disk format of an outbox, shared by the half that writes it and the half that delivers it."""

package bundle

// Index is the index.json that belongs to a list.
func (c Contents) Index() []byte { return c.index() }

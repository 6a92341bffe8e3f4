package bundle

import (
	"bytes"
	"fmt"
	"unicode/utf8"

	"golang.org/x/mod/sumdb/tlog"

	"tidemark/audit"
)

// A line is an event in a bundle.
type line struct {
	Index int64            `json:"index"`
	Leaf  string           `json:"leaf"` // the bytes that are hashed
	Proof tlog.RecordProof `json:"proof"`
}

// encodeLine returns the line of an event, with its end.
func encodeLine(e audit.Entry, proof tlog.RecordProof) ([]byte, error) {
	if !utf8.Valid(e.Leaf) {
		return nil, fmt.Errorf("event %d is not UTF-8", e.Index)
	}
	if proof == nil {
		proof = tlog.RecordProof{}
	}
	b, err := marshal(line{e.Index, string(e.Leaf), proof})
	if err == nil && len(b) > maxLine {
		err = fmt.Errorf("event %d has %d bytes with its proof, more than %d", e.Index, len(b), maxLine)
	}
	return b, err
}

// parseLine reads what encodeLine wrote.
func parseLine(b []byte) (audit.Entry, tlog.RecordProof, error) {
	var l line
	if err := unmarshal(b, &l); err != nil {
		return audit.Entry{}, nil, err
	}
	e := audit.Entry{Index: l.Index, Leaf: []byte(l.Leaf)}
	again, err := encodeLine(e, l.Proof)
	if err == nil && !bytes.Equal(b, again) {
		err = fmt.Errorf("is not in the one form that a line has: byte %d differs", firstDifference(b, again))
	}
	return e, l.Proof, err
}

// A history follows the events of a bundle: each is in the signed tree, is about
// an image of the bundle, and goes on where the one before it about that image
// ended. When all are there it tells whether they end with what the list says.
type history struct {
	tree   tlog.Tree
	delta  bool
	from   int64 // of a delta: where a ref goes on that its base has
	images []Image
	refs   []audit.Ref // of images

	chains audit.Chains
	course map[audit.Ref]*course
	next   int64 // the lowest index that may follow
}

// A course is what was said of one ref.
type course struct {
	first int64 // index of the first event, -1 before it
	last  int64 // and of the last
	begun bool  // its first sighting is among them
}

func newHistory(c Contents, tree tlog.Tree) (*history, error) {
	h := &history{tree: tree, delta: c.Base != nil, images: c.Images, course: make(map[audit.Ref]*course)}
	if h.chains.Midway = h.delta; h.delta {
		h.from = c.Base.LogSize
	}
	for _, im := range c.Images {
		ref, err := audit.ParseRef(im.Ref)
		if err != nil {
			return nil, wrong(contentsEntry, "image %v", err)
		}
		h.refs = append(h.refs, ref)
		h.course[ref] = &course{first: -1, last: -1}
	}
	return h, nil
}

// add follows the next event.
func (h *history) add(e audit.Entry, proof tlog.RecordProof) error {
	fail := func(format string, args ...any) error {
		return wrong(eventsEntry, "event %d %s", e.Index, fmt.Sprintf(format, args...))
	}
	if e.Index < h.next {
		return fail("comes after event %d", h.next-1)
	}
	h.next = e.Index + 1
	if e.Index >= h.tree.N {
		return fail("is beyond the %d entries that the checkpoint signs", h.tree.N)
	}
	if err := tlog.CheckRecord(proof, h.tree.N, h.tree.Hash, e.Index, tlog.RecordHash(e.Leaf)); err != nil {
		return fail("is not in the tree that the checkpoint signs: %v", err)
	}
	ev, err := audit.ParseLeaf(e.Leaf)
	if err != nil {
		return fail("cannot be read: %v", err)
	}
	c := h.course[ev.Ref]
	if c == nil {
		return fail("is about %q, which is no image of the bundle", ev.Ref)
	}
	if p := h.chains.Add(e.Index, e.Leaf); p != nil {
		return fail("breaks the chain of %s: %s", p.Ref, p.What)
	}
	if c.first < 0 {
		c.first = e.Index
	}
	c.last, c.begun = e.Index, c.begun || ev.Type == audit.FirstSeen
	return nil
}

// end tells whether the events lead to the images that are listed. A ref of a
// delta has its whole history, or what came since the base, which may be nothing:
// then it means what the base has.
func (h *history) end() error {
	for i, im := range h.images {
		c := h.course[h.refs[i]]
		_, served := h.chains.Last(h.refs[i])
		switch {
		case c.last < 0 && h.delta && im.Index < h.from:
		case c.last < 0:
			return wrong("image "+im.Ref, "its last event is %d, and the bundle has no event of it", im.Index)
		case !c.begun && c.first < h.from:
			return wrong("image "+im.Ref, "the bundle has its event %d, which the base of %d entries has, without the first one, %s", c.first, h.from, audit.FirstSeen)
		case !h.delta && !c.begun:
			return wrong("image "+im.Ref, "the bundle lacks its first event, %s", audit.FirstSeen)
		case c.last != im.Index:
			return wrong("image "+im.Ref, "its last event in the bundle is %d, the list says %d", c.last, im.Index)
		case served != im.Digest:
			return wrong("image "+im.Ref, "event %d says that %q is served, the list says %s", c.last, served, im.Digest)
		}
	}
	return nil
}

package bundle

import (
	"maps"
	"slices"

	"github.com/opencontainers/go-digest"
)

// A Description is what a manifest's own bytes say about it.
type Description struct {
	Index   bool          // Refers are manifests, one a platform; otherwise config and layers
	Subject digest.Digest // the manifest that this one is about, "" without one
	Refers  []Reference
}

// A Reference points from a manifest to content.
type Reference struct {
	Digest   digest.Digest
	Size     int64  // -1 when the manifest does not tell
	Platform string // of a manifest in an index, os/arch[/variant]; "" if it is about another, or not told
}

// A closure tells whether what the manifests of a bundle need is in it, or left
// out because the base has it. It looks at one manifest at a time.
//
// What an omitted manifest needs is not known: it was complete in the base.
type closure struct {
	listed    map[digest.Digest]holding
	images    map[digest.Digest][]Image
	referrers map[digest.Digest][]Referrer

	whole   map[digest.Digest]bool  // manifests that another one needs, with all that they refer to
	partial map[digest.Digest]error // why a manifest is not whole, though enough for its image
}

type holding struct {
	size int64
	kind kind
}

// kind is the list that content is in.
type kind int

const (
	manifest kind = iota
	blob
	omitted
)

// newClosure returns the closure of a list, or what the list itself lacks.
func newClosure(c Contents) (*closure, error) {
	cl := &closure{
		listed: make(map[digest.Digest]holding), images: make(map[digest.Digest][]Image), referrers: make(map[digest.Digest][]Referrer),
		whole: make(map[digest.Digest]bool), partial: make(map[digest.Digest]error),
	}
	for k, list := range [][]Blob{manifest: c.Manifests, blob: c.Blobs, omitted: c.Omitted} {
		for _, b := range list {
			if err := legal(b.Digest); err != nil {
				return nil, wrong(contentsEntry, "%v", err)
			}
			if _, twice := cl.listed[b.Digest]; twice {
				return nil, wrong(contentsEntry, "%s is listed twice", b.Digest)
			}
			if b.Size < 0 || kind(k) == manifest && b.Size > maxManifest {
				return nil, wrong(contentsEntry, "%s cannot have %d bytes", b.Digest, b.Size)
			}
			cl.listed[b.Digest] = holding{b.Size, kind(k)}
		}
	}
	for _, im := range c.Images {
		if err := cl.has("image "+im.Ref, Reference{Digest: im.Digest, Size: im.Size}, true); err != nil {
			return nil, err
		}
		cl.images[im.Digest] = append(cl.images[im.Digest], im)
	}
	for _, r := range c.Referrers {
		d := r.Descriptor
		if err := cl.has("referrer of "+r.Repository, Reference{Digest: d.Digest, Size: d.Size}, true); err != nil {
			return nil, err
		}
		if err := cl.has("referrer "+d.Digest.String(), Reference{Digest: r.Subject, Size: -1}, true); err != nil {
			return nil, err
		}
		cl.referrers[d.Digest] = append(cl.referrers[d.Digest], r)
	}
	return cl, nil
}

// has finds what from refers to in the lists, as a manifest if it must be one.
func (cl *closure) has(from string, r Reference, isManifest bool) error {
	h, ok := cl.listed[r.Digest]
	switch {
	case !ok:
		return wrong(from, "needs %s, which is not in the bundle", r.Digest)
	case isManifest && h.kind == blob:
		return wrong(from, "needs %s as a manifest, and it is listed as a blob", r.Digest)
	case r.Size >= 0 && r.Size != h.size:
		return wrong(from, "says that %s has %d bytes, the list says %d", r.Digest, r.Size, h.size)
	}
	return nil
}

// check finds what a manifest needs and the bundle does not have, and what it
// contradicts.
func (cl *closure) check(d digest.Digest, m Description) error {
	entry := blobEntry(d)
	for _, r := range cl.referrers[d] {
		if m.Subject != r.Subject {
			return wrong(entry, "is about %q, the list has it as a referrer of %s", m.Subject, r.Subject)
		}
	}
	all := len(cl.images[d]) == 0 || len(cl.referrers[d]) > 0 // that it refers to is needed, not only what is for these:
	var platforms []string
	for _, im := range cl.images[d] {
		if !m.Index && len(im.Platforms) > 0 {
			return wrong(entry, "is no index, the list has platforms of %s", im.Ref)
		}
		for _, p := range im.Platforms {
			if !slices.ContainsFunc(m.Refers, func(r Reference) bool { return r.Platform == p }) {
				return wrong(entry, "has no manifest for %s, which is a platform of %s", p, im.Ref)
			}
		}
		platforms = append(platforms, im.Platforms...)
		all = all || len(im.Platforms) == 0
	}
	for _, r := range m.Refers {
		_, listed := cl.listed[r.Digest]
		needed := all || slices.Contains(platforms, r.Platform)
		if !needed && !listed {
			cl.partial[d] = cl.has(entry, r, m.Index)
			continue
		}
		if err := cl.has(entry, r, m.Index); err != nil {
			return err
		}
		if needed && m.Index {
			cl.whole[r.Digest] = true
		}
	}
	return nil
}

// end tells, when all manifests were checked, whether one that has only some
// platforms is part of what must be whole.
func (cl *closure) end() error {
	for _, d := range slices.Sorted(maps.Keys(cl.partial)) {
		if cl.whole[d] {
			return cl.partial[d]
		}
	}
	return nil
}

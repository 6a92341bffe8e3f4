// Package carry takes images, and what the log says of them, to a place without
// network, and takes them in there.
package carry

import (
	"context"
	"iter"
	"maps"
	"sync"

	"github.com/opencontainers/go-digest"
	"golang.org/x/mod/sumdb/tlog"

	"tidemark/audit"
	"tidemark/audit/bundle"
	"tidemark/cache"
	"tidemark/proxy/oci"
)

// A Store is what the ledger has recorded, and takes in.
type Store interface {
	Records
	audit.Importer

	// TrustedKey returns the verifier by which a bundle of a log was imported
	// before, or "".
	TrustedKey(ctx context.Context, origin string) (string, error)
}

// Records are what is recorded of refs, and the tree of the log.
type Records interface {
	// Tree returns the committed tree. State is the zero State of a ref never seen.
	Tree(context.Context) (tlog.Tree, error)
	State(context.Context, audit.Ref) (audit.State, error)
	tlog.HashReader

	// Events returns the entries that a query selects; EachEvent those about refs,
	// each from an index on, up to but without entry end, in order.
	Events(context.Context, audit.EventQuery) ([]audit.Entry, error)
	EachEvent(ctx context.Context, from map[audit.Ref]int64, end int64) iter.Seq2[audit.Entry, error]

	// History is what a ref meant, newest first. Chronicle is all that is known of
	// it, and Referrers what is known to refer to a manifest of a repository.
	History(context.Context, audit.Ref, audit.HistoryQuery) ([]audit.Stint, error)
	Chronicle(context.Context, audit.Ref) (audit.Chronicle, error)
	Referrers(ctx context.Context, upstream, repository string, subject digest.Digest) ([]audit.Referrer, error)
}

// Options configure a Carrier. All are required.
type Options struct {
	Cache  *cache.Cache
	Ledger *audit.Ledger
	Signer *audit.Signer
	Store  Store

	// Upstream tells whether an upstream is configured.
	Upstream func(name string) bool
}

// A Carrier exports and imports bundles.
type Carrier struct {
	o Options

	mu     sync.Mutex
	packed map[digest.Digest]int // exports that are reading it
}

// New returns a Carrier. It starts nothing.
func New(o Options) *Carrier { return &Carrier{o: o, packed: make(map[digest.Digest]int)} }

// Pins are what exports under way are reading.
func (c *Carrier) Pins() []cache.Pin {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []cache.Pin
	for d := range c.packed {
		out = append(out, cache.Pin{Digest: d, Firm: true})
	}
	return out
}

// hold keeps content here until it is released.
func (c *Carrier) hold(content iter.Seq[digest.Digest]) (release func()) {
	held := make([]digest.Digest, 0)
	c.mu.Lock()
	for d := range content {
		c.packed[d]++
		held = append(held, d)
	}
	c.mu.Unlock()
	for _, d := range held {
		c.o.Cache.Keep(d, true)
	}
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, d := range held {
			if c.packed[d]--; c.packed[d] == 0 {
				delete(c.packed, d)
			}
		}
		c.o.Cache.Repin()
	}
}

// Describe tells a bundle what package oci knows of manifests.
func Describe(manifest []byte) (bundle.Description, error) {
	d, err := oci.Describe(manifest)
	if err != nil {
		return bundle.Description{}, err
	}
	out := bundle.Description{Index: d.Index}
	for _, r := range d.Refers {
		out.Refers = append(out.Refers, bundle.Reference{Digest: r.Digest, Size: r.Size, Platform: r.Platform})
	}
	out.Subject, _, _ = oci.Referring(manifest)
	return out, nil
}

// A parcel is content that belongs together, in bytes, and what of it is not here.
type parcel struct {
	manifests, blobs map[digest.Digest]int64
	missing          []cache.Reference
}

func newParcel() *parcel {
	return &parcel{manifests: make(map[digest.Digest]int64), blobs: make(map[digest.Digest]int64)}
}

func (p *parcel) add(other *parcel) {
	maps.Copy(p.manifests, other.manifests)
	maps.Copy(p.blobs, other.blobs)
	p.missing = append(p.missing, other.missing...)
}

// gather finds the content of an image. Of an index it takes the images of some
// platforms or, with nil, of all; what is about them only if it is here whole.
// partial are the platforms of an index of which not everything is taken.
func (c *Carrier) gather(ctx context.Context, root digest.Digest, platforms []string) (p *parcel, partial []string, err error) {
	p = newParcel()
	d, err := c.open(ctx, p, root, -1)
	if err != nil || p.missing != nil {
		return p, nil, err
	}
	if !d.Index {
		if c.blobs(p, d); len(p.missing) == 0 && !c.isFor(ctx, d, platforms) {
			return p, []string{}, nil
		}
		return p, nil, nil
	}
	whole := platforms == nil
	taken := []string{}
	for _, r := range d.Refers {
		child := newParcel()
		if r.Platform != "" && !oci.Wanted(platforms, r.Platform) {
			continue
		}
		if err := c.whole(ctx, child, r.Digest, r.Size); err != nil {
			return nil, nil, err
		}
		about := r.Platform == "" && hasPlatforms(d)
		if about && len(child.missing) > 0 {
			whole = false
			continue
		}
		if r.Platform != "" {
			taken = append(taken, r.Platform)
		}
		p.add(child)
	}
	if whole {
		return p, nil, nil
	}
	return p, taken, nil
}

// isFor tells whether an image that is no index is for platforms. One that does not tell
// is for all.
func (c *Carrier) isFor(ctx context.Context, d oci.Description, platforms []string) bool {
	if platforms == nil || len(d.Refers) == 0 {
		return true
	}
	config, err := c.o.Cache.Read(ctx, d.Refers[0].Digest, nil, oci.MaxManifest)
	if err != nil {
		return true // it is no configuration
	}
	platform := oci.PlatformOf(config)
	return platform == "" || oci.Wanted(platforms, platform)
}

func hasPlatforms(d oci.Description) bool {
	for _, r := range d.Refers {
		if r.Platform != "" {
			return true
		}
	}
	return false
}

// whole finds a manifest and everything below it.
func (c *Carrier) whole(ctx context.Context, p *parcel, dgst digest.Digest, size int64) error {
	if _, known := p.manifests[dgst]; known {
		return nil
	}
	before := len(p.missing)
	d, err := c.open(ctx, p, dgst, size)
	if err != nil || len(p.missing) > before {
		return err
	}
	if !d.Index {
		c.blobs(p, d)
		return nil
	}
	for _, r := range d.Refers {
		if err := c.whole(ctx, p, r.Digest, r.Size); err != nil {
			return err
		}
	}
	return nil
}

// open reads a manifest into a parcel, or notes that it is missing.
func (c *Carrier) open(ctx context.Context, p *parcel, dgst digest.Digest, size int64) (oci.Description, error) {
	if _, here := c.o.Cache.Holds(dgst); !here {
		p.missing = append(p.missing, cache.Reference{Digest: dgst, Size: size})
		return oci.Description{}, nil
	}
	body, err := c.o.Cache.Read(ctx, dgst, nil, oci.MaxManifest)
	if err != nil {
		return oci.Description{}, err
	}
	d, err := oci.Describe(body)
	if err == nil {
		p.manifests[dgst] = int64(len(body))
	}
	return d, err
}

func (c *Carrier) blobs(p *parcel, d oci.Description) {
	for _, r := range d.Refers {
		if size, here := c.o.Cache.Holds(r.Digest); here {
			p.blobs[r.Digest] = size
		} else {
			p.missing = append(p.missing, cache.Reference{Digest: r.Digest, Size: r.Size})
		}
	}
}

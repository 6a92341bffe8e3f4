package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tidemark/audit"
	"tidemark/audit/diff"
	"tidemark/cache"
	"tidemark/proxy/oci"
	"tidemark/proxy/route"
	"tidemark/proxy/upstream"
)

// Contents is where the ledger and its readers look at what digests stand for:
// what is here, else upstream.
type Contents struct {
	upstreams map[string]*upstream.Upstream
	cache     *cache.Cache
	note      NoteReferrers
	history   History
}

// A History returns what a ref meant, newest first.
type History func(ctx context.Context, ref audit.Ref, q audit.HistoryQuery) ([]audit.Stint, error)

// NewContents returns the contents of a cache in front of upstreams. What refers to
// what in that which arrives is told to note. Without a history no base image is
// recognized.
func NewContents(upstreams map[string]*upstream.Upstream, c *cache.Cache, note NoteReferrers, history History) *Contents {
	return &Contents{upstreams, c, note, history}
}

func (c *Contents) repository(ref audit.Ref) (repository, error) {
	up := c.upstreams[ref.Upstream]
	if up == nil {
		return repository{}, fmt.Errorf("%s is not a configured upstream", ref.Upstream)
	}
	return repository{Target: route.Target{Upstream: ref.Upstream, Repository: ref.Repository}, upstream: up, cache: c.cache, referrer: func(r repository, manifest []byte) { noteReferrer(c.note, r, manifest) }}, nil
}

// Complete has all bytes of dgst, which belongs to ref, here and pinned: of an
// index those of the images that clients have pulled; if there are none, of the
// one for this machine; if that is not there either, of all.
func (c *Contents) Complete(ctx context.Context, ref audit.Ref, dgst digest.Digest) error {
	repo, err := c.repository(ref)
	if err != nil {
		return err
	}
	c.cache.Keep(dgst, true) // what is here; what arrives is kept while it is new
	root, _, err := c.cache.Manifest(ctx, dgst, repo.manifest(dgst))
	if err != nil {
		return err
	}
	images := []*cache.Manifest{root}
	if root.Index {
		if images, err = c.consumed(ctx, repo, root); err != nil {
			return err
		}
	}
	for _, m := range images {
		for _, r := range m.Refers {
			if err := c.cache.Ensure(ctx, r.Digest, repo.blob(r.Digest)); err != nil {
				return fmt.Errorf("%s of %s: %w", r.Digest, m.Digest, err)
			}
		}
	}
	c.cache.Keep(dgst, true)
	return nil
}

// consumed are the images of an index that are to be complete.
func (c *Contents) consumed(ctx context.Context, repo repository, index *cache.Manifest) ([]*cache.Manifest, error) {
	d, err := oci.Describe(index.Body)
	if err != nil {
		return nil, err
	}
	pulled := func(r oci.Descriptor) bool { _, here := c.cache.Stat(r.Digest); return here }
	native := func(r oci.Descriptor) bool {
		return strings.HasPrefix(r.Platform+"/", "linux/"+runtime.GOARCH+"/")
	}
	wanted := d.Refers
	for _, which := range []func(oci.Descriptor) bool{pulled, native} {
		if slices.ContainsFunc(d.Refers, which) {
			wanted = slices.DeleteFunc(slices.Clone(d.Refers), func(r oci.Descriptor) bool { return !which(r) })
			break
		}
	}
	var out []*cache.Manifest
	for _, r := range wanted {
		m, _, err := c.cache.Manifest(ctx, r.Digest, repo.manifest(r.Digest))
		if err != nil {
			return nil, err
		}
		out = append(out, m)
	}
	return out, nil
}

// Keep stores bytes of our own making as content, and returns their digest.
func (c *Contents) Keep(ctx context.Context, body []byte) (digest.Digest, error) {
	return keep(ctx, c.cache, body)
}

func keep(ctx context.Context, c *cache.Cache, body []byte) (digest.Digest, error) {
	dgst := digest.FromBytes(body)
	return dgst, c.Ensure(ctx, dgst, given{"tidemark itself", body})
}

// compareTime bounds what a move waits for its explanation. Whoever pulls waits
// too.
const compareTime = 5 * time.Second

// Compare explains a move from old to new, which is here, as far as can be told
// soon: from what is here, and of the new image what clients who had the old one
// will ask for next anyway. The diff is stored as content.
func (c *Contents) Compare(ctx context.Context, ref audit.Ref, old, new digest.Digest, had *audit.Trust) *audit.Comparison {
	repo, err := c.repository(ref)
	if err != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, compareTime)
	defer cancel()
	var wg sync.WaitGroup
	var trust *audit.TrustChange
	wg.Go(func() { trust = repo.trustChange(ctx, old, new, had) })
	defer wg.Wait()
	cmp := repo.comparison(ctx, old, new, c.base)
	wg.Wait()
	if cmp == nil && trust != nil {
		cmp = &audit.Comparison{Old: old, New: new}
	} else if cmp == nil {
		return nil
	}
	cmp.Trust = trust
	return cmp
}

// compare is Compare with the rights that the repository is asked with. Of other
// repositories nothing is known by these.
func (r repository) compare(ctx context.Context, old, new digest.Digest) *audit.Comparison {
	ctx, cancel := context.WithTimeout(ctx, compareTime)
	defer cancel()
	return r.comparison(ctx, old, new, func(context.Context, *diff.Diff) audit.Ref { return audit.Ref{} })
}

// comparison is what a diff means for the ledger, nil if the two cannot be compared. The
// diff is stored as content.
func (r repository) comparison(ctx context.Context, old, new digest.Digest, base func(context.Context, *diff.Diff) audit.Ref) *audit.Comparison {
	rd := r.reader(ctx, old, new, false)
	d, err := diff.Between(old, new, rd.read)
	if err != nil {
		return nil
	}
	if rd.failed {
		d.Signals = append(d.Signals, audit.NotCompared)
	}
	cmp := &audit.Comparison{Old: old, New: new, Class: audit.Class(d.Class), Signals: d.Signals, Created: d.Created()}
	cmp.Base = base(ctx, d)
	cmp.OldVersion, cmp.NewVersion = d.Says(ocispec.AnnotationVersion)
	if s := rd.consumes(old, d); s != "" {
		cmp.Signals = append(slices.Clone(d.Signals), s)
	}
	body := d.Encode()
	if kept, err := keep(ctx, r.cache, body); err == nil {
		t := d.Totals()
		cmp.Diff = &audit.DiffRef{
			Digest: kept, Size: int64(len(body)),
			Platforms:  audit.PlatformCount{Added: len(d.Platforms.Added), Removed: len(d.Platforms.Removed), Changed: len(d.Platforms.Changed)},
			Layers:     audit.LayerCount{Shared: t.Shared, Added: t.Added, Removed: t.Removed},
			BytesDelta: t.BytesDelta, ConfigChanged: t.ConfigChanged,
		}
	}
	return cmp
}

// Diff compares two digests of ref, and asks upstream for what is not here. That
// is not kept: somebody looked at it, nobody pulled it.
func (c *Contents) Diff(ctx context.Context, ref audit.Ref, old, new digest.Digest) (*diff.Diff, error) {
	repo, err := c.repository(ref)
	if err != nil {
		// The upstream is not configured any more: what is here must do.
		r := &reader{ctx: ctx, cache: c.cache}
		return diff.Between(old, new, r.read)
	}
	return repo.diff(ctx, old, new, true)
}

func (r repository) diff(ctx context.Context, old, new digest.Digest, ask bool) (*diff.Diff, error) {
	return diff.Between(old, new, r.reader(ctx, old, new, ask).read)
}

func (r repository) reader(ctx context.Context, old, new digest.Digest, ask bool) *reader {
	rd := &reader{ctx: ctx, repo: r, cache: r.cache, passing: ask, sources: make(map[digest.Digest]cache.Source)}
	rd.expect(old, new, ask)
	return rd
}

// A reader reads what a comparison is about. It asks upstream only for what it
// expects.
type reader struct {
	ctx     context.Context // of the one comparison
	repo    repository
	cache   *cache.Cache
	passing bool // nothing that is read is kept
	sources map[digest.Digest]cache.Source
	failed  bool // something that was expected could not be had
}

// expect finds out what may be asked for: the new images of the platforms whose
// old ones are here, or everything.
func (r *reader) expect(old, new digest.Digest, everything bool) {
	if everything {
		r.sources[old], r.sources[new] = r.repo.manifest(old), r.repo.manifest(new)
	}
	consumed := make(map[string]bool)
	for _, o := range r.children(old) {
		_, here := r.cache.Stat(o.Digest)
		consumed[diff.Canonical(o.Platform)] = here
		if everything {
			r.sources[o.Digest] = r.repo.manifest(o.Digest)
		}
	}
	for _, n := range r.children(new) {
		if n.Platform != "" && (everything || consumed[diff.Canonical(n.Platform)]) {
			r.sources[n.Digest] = r.repo.manifest(n.Digest)
		}
	}
	if !everything {
		r.sources[new] = r.repo.manifest(new)
	}
}

// children are the images of an index, or nothing.
func (r *reader) children(dgst digest.Digest) []oci.Descriptor {
	body, err := r.read(dgst)
	if err != nil {
		return nil
	}
	d, err := oci.Describe(body)
	if err != nil || !d.Index {
		return nil
	}
	return d.Refers
}

// read returns what is here, or what upstream has if it was expected. What a
// manifest that was asked for refers to first is its configuration.
func (r *reader) read(dgst digest.Digest) ([]byte, error) {
	src := r.sources[dgst]
	body, err := r.cache.Read(r.ctx, dgst, nil, oci.MaxManifest)
	switch {
	case err == nil:
	case src == nil:
		return nil, err
	case r.passing:
		body, err = pass(r.ctx, dgst, src)
	default:
		body, err = r.cache.Read(r.ctx, dgst, src, oci.MaxManifest)
	}
	if errors.Is(err, fs.ErrNotExist) && src != nil {
		r.repo.upstream.Forget(r.repo.Repository, dgst.String()) // it may be on its way, and a client asks for it next
	}
	if err != nil || src == nil {
		r.failed = r.failed || err != nil
		return body, err
	}
	if d, err := oci.Describe(body); err == nil && !d.Index && len(d.Refers) > 0 {
		config := d.Refers[0].Digest
		if _, known := r.sources[config]; !known {
			r.sources[config] = r.repo.blob(config)
		}
	}
	return body, nil
}

// pass reads content from its source and keeps nothing.
func pass(ctx context.Context, dgst digest.Digest, src cache.Source) ([]byte, error) {
	content, err := src.Open(ctx, 0, -1)
	if err != nil {
		return nil, err
	}
	defer content.Body.Close()
	body, err := io.ReadAll(io.LimitReader(content.Body, oci.MaxManifest+1))
	if err != nil {
		return nil, err
	}
	if len(body) > oci.MaxManifest || dgst.Algorithm().FromBytes(body) != dgst {
		return nil, fmt.Errorf("read %s: %w", dgst, cache.ErrMismatch)
	}
	return body, nil
}

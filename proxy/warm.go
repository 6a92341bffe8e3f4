package proxy

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"tidemark/audit"
	"tidemark/cache"
	"tidemark/proxy/oci"
	"tidemark/proxy/upstream"
)

// A Want is an image that is to be here: what a tag means, or a digest.
type Want struct {
	Ref    audit.Ref // without a tag when Digest is set
	Digest digest.Digest
}

// String is the reference that was asked for.
func (w Want) String() string {
	if w.Digest != "" {
		return w.Ref.Upstream + "/" + w.Ref.Repository + "@" + w.Digest.String()
	}
	return w.Ref.String()
}

// Warmed is what became of a Want.
type Warmed struct {
	Image  Image
	Filled int   // pieces of content that were not here before
	Bytes  int64 // of them
}

// Bounds of what is fetched ahead of time: enough to keep a connection busy, and not
// so much that clients wait behind it.
const (
	warmBlobs   = 4                      // of one image at a time
	warmedEvery = 500 * time.Millisecond // progress is told
)

// Warm has an image here, of some platforms or, with nil, of all, with what refers to
// it. The tag is resolved as a pull resolves it. progress is told now and then how
// much of what is missing has arrived. What has arrived stays when it fails or ctx
// ends: the next time goes on from there.
func (c *Contents) Warm(ctx context.Context, ledger *audit.Ledger, w Want, platforms []string, progress func(d digest.Digest, have, total int64)) (Warmed, error) {
	repo, err := c.repository(w.Ref)
	if err != nil {
		return Warmed{}, err
	}
	dgst := w.Digest
	if dgst == "" {
		ans, err := ledger.Resolve(ctx, w.Ref, repo.ask(w.Ref.Tag, "warm"))
		if err != nil {
			return Warmed{}, err
		}
		dgst = ans.Served
	}
	f := &filling{ctx: ctx, c: c.cache, ledger: ledger, repo: repo, platforms: platforms, seen: make(map[digest.Digest]bool)}
	if err := f.manifests(dgst, true); err != nil {
		return Warmed{}, err
	}
	if err := f.referrers(dgst); err != nil {
		return Warmed{}, err
	}
	err = f.blobs(func(have int64) { progress(dgst, have, f.total) })
	image, lerr := c.Image(ctx, dgst, platforms, false)
	return Warmed{image, f.filled + int(f.arrived.Load()), f.bytes + f.arrivedBytes.Load()}, errors.Join(err, lerr)
}

// A filling fetches one image.
type filling struct {
	ctx       context.Context // of the one image
	c         *cache.Cache
	ledger    *audit.Ledger
	repo      repository
	platforms []string
	seen      map[digest.Digest]bool
	images    []digest.Digest   // what can be referred to
	missing   []cache.Reference // blobs
	total     int64             // bytes of missing, as far as is told

	filled                int // manifests
	bytes                 int64
	arrived, arrivedBytes atomic.Int64 // blobs
}

// manifests fetches a manifest and those of its images that are wanted, and finds out
// which blobs are missing.
func (f *filling) manifests(dgst digest.Digest, root bool) error {
	if f.seen[dgst] {
		return nil
	}
	f.seen[dgst] = true
	m, outcome, err := f.c.Manifest(f.ctx, dgst, f.repo.manifest(dgst))
	if err != nil {
		return fmt.Errorf("manifest %s: %w", dgst, err)
	}
	if outcome != cache.Hit {
		f.filled++
		f.bytes += int64(len(m.Body))
	}
	f.images = append(f.images, dgst)
	if !m.Index {
		f.blobsOf(m)
		return nil
	}
	d, err := oci.Describe(m.Body)
	if err != nil {
		return err
	}
	wanted := slices.DeleteFunc(slices.Clone(d.Refers), func(r oci.Descriptor) bool {
		return f.platforms != nil && !oci.Wanted(f.platforms, r.Platform)
	})
	if root && len(wanted) == 0 && len(d.Refers) > 0 {
		return fmt.Errorf("it has no image for %s; it has %s", strings.Join(f.platforms, ", "), strings.Join(platformsOf(d), ", "))
	}
	for _, r := range wanted {
		if err := f.manifests(r.Digest, false); err != nil {
			return err
		}
	}
	return nil
}

func platformsOf(d oci.Description) []string {
	var out []string
	for _, r := range d.Refers {
		if r.Platform != "" && !slices.Contains(out, r.Platform) {
			out = append(out, r.Platform)
		}
	}
	return out
}

func (f *filling) blobsOf(m *cache.Manifest) {
	for _, r := range m.Refers {
		if _, here := f.c.Holds(r.Digest); !here && !f.seen[r.Digest] {
			f.missing = append(f.missing, r)
			f.total += max(0, r.Size)
		}
		f.seen[r.Digest] = true
	}
}

// listed is what refers to a manifest by the registry's list or, where it keeps none, by
// the one that clients keep under a tag.
func (f *filling) listed(subject digest.Digest) ([]upstream.Referrer, error) {
	list, err := f.repo.upstream.Referrers(f.ctx, f.repo.Repository, subject)
	if !errors.Is(err, fs.ErrNotExist) {
		return list, err
	}
	tag := oci.ReferrersTag(subject)
	ans, err := f.ledger.Resolve(f.ctx, f.repo.ref(tag), f.repo.ask(tag, "warm"))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, err
	}
	m, _, err := f.c.Manifest(f.ctx, ans.Served, f.repo.manifest(ans.Served))
	if err != nil {
		return nil, err
	}
	return taggedReferrers(m), nil
}

// referrers fetches what refers to the image: signatures and what says where it is
// from.
func (f *filling) referrers(root digest.Digest) error {
	for _, subject := range f.images {
		list, err := f.listed(subject)
		switch {
		case errors.Is(err, upstream.ErrOffline):
			continue // what is known is all there is
		case err != nil:
			return fmt.Errorf("what refers to %s: %w", subject, err)
		}
		for _, r := range list {
			dgst, err := oci.ParseDigest(r.Digest)
			if err != nil {
				return f.repo.nonsense("referrers of "+subject.String(), err)
			}
			if err := f.manifests(dgst, false); err != nil {
				return fmt.Errorf("which refers to %s: %w", root, err)
			}
		}
	}
	return nil
}

// blobs fetches what is missing.
func (f *filling) blobs(progress func(have int64)) error {
	done := make(chan struct{})
	told := make(chan struct{})
	go func() {
		defer close(told)
		tick := time.NewTicker(warmedEvery)
		defer tick.Stop()
		for {
			progress(f.have())
			select {
			case <-tick.C:
			case <-done:
				return
			}
		}
	}()
	defer func() { close(done); <-told }()
	g, ctx := errgroup.WithContext(f.ctx)
	g.SetLimit(warmBlobs)
	for _, r := range f.missing {
		g.Go(func() error {
			if err := f.c.Ensure(ctx, r.Digest, f.repo.blob(r.Digest)); err != nil {
				return fmt.Errorf("blob %s: %w", r.Digest, err)
			}
			size, _ := f.c.Holds(r.Digest)
			f.arrived.Add(1)
			f.arrivedBytes.Add(size)
			return nil
		})
	}
	return g.Wait()
}

// have is how much has arrived of what was missing, with what is on its way.
func (f *filling) have() int64 {
	have := f.arrivedBytes.Load()
	for _, fill := range f.c.Stats().Fills {
		if slices.ContainsFunc(f.missing, func(r cache.Reference) bool { return r.Digest == fill.Digest }) {
			have += fill.Have
		}
	}
	return min(have, f.total)
}

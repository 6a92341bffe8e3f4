package proxy

import (
	"context"
	"errors"
	"io/fs"
	"slices"

	"github.com/opencontainers/go-digest"

	"tidemark/cache"
	"tidemark/proxy/oci"
)

// An Image is how much of what a digest stands for is here.
type Image struct {
	Digest    digest.Digest
	Platforms []PlatformImage // one of an image, none of an index that is not here itself
}

// A PlatformImage is the image of one platform.
type PlatformImage struct {
	Platform string // "" when nothing that is here tells
	Digest   digest.Digest
	Complete bool
	Bytes    int64             // that are here
	Missing  []cache.Reference // with size -1 where it is not known
}

// Complete tells whether there is an image, and all of its platforms are complete.
func (i Image) Complete() bool {
	return len(i.Platforms) > 0 && !slices.ContainsFunc(i.Platforms, func(p PlatformImage) bool { return !p.Complete })
}

// Image tells how much of the image of a digest is here, of some platforms or, with
// nil, of all. Nobody is asked. With verify all that is here is read and compared
// with its digest, and what does not match it is missing from then on.
func (c *Contents) Image(ctx context.Context, dgst digest.Digest, platforms []string, verify bool) (Image, error) {
	look := &inspection{ctx: ctx, c: c.cache, platforms: platforms, verify: verify}
	err := look.into(dgst, -1, "")
	return Image{dgst, look.found}, err
}

// An inspection looks at the content of one image.
type inspection struct {
	ctx       context.Context // of the one look
	c         *cache.Cache
	platforms []string
	verify    bool
	found     []PlatformImage
}

func (l *inspection) into(dgst digest.Digest, size int64, platform string) error {
	_, here, err := l.here(dgst)
	if err != nil {
		return err
	}
	var body []byte
	if err = fs.ErrNotExist; here {
		body, err = l.c.Read(l.ctx, dgst, nil, oci.MaxManifest)
	}
	if l.ctx.Err() != nil {
		return context.Cause(l.ctx)
	}
	if err != nil {
		if oci.Wanted(l.platforms, platform) || platform == "" {
			l.found = append(l.found, PlatformImage{Platform: platform, Digest: dgst, Missing: []cache.Reference{{Digest: dgst, Size: size}}})
		}
		return nil
	}
	d, err := oci.Describe(body)
	switch {
	case err != nil:
		return nil
	case d.Index:
		for _, r := range d.Refers {
			if r.Platform == "" || !oci.Wanted(l.platforms, r.Platform) {
				continue // about an image, or not asked for
			}
			if err := l.into(r.Digest, r.Size, r.Platform); err != nil {
				return err
			}
		}
		return nil
	}
	return l.image(dgst, int64(len(body)), d, platform)
}

// image looks at an image that is no index.
func (l *inspection) image(dgst digest.Digest, size int64, d oci.Description, platform string) error {
	p := PlatformImage{Platform: platform, Digest: dgst, Bytes: size}
	seen := make(map[digest.Digest]bool) // a layer can be there twice
	for i, r := range d.Refers {
		if seen[r.Digest] {
			continue
		}
		seen[r.Digest] = true
		stored, here, err := l.here(r.Digest)
		switch {
		case err != nil:
			return err
		case here:
			p.Bytes += stored
		default:
			p.Missing = append(p.Missing, cache.Reference{Digest: r.Digest, Size: r.Size})
		}
		if i == 0 && here && p.Platform == "" { // the configuration comes first
			if config, err := l.c.Read(l.ctx, r.Digest, nil, oci.MaxManifest); err == nil {
				p.Platform = oci.PlatformOf(config)
			}
		}
	}
	if platform == "" && p.Platform != "" && !oci.Wanted(l.platforms, p.Platform) {
		return nil
	}
	p.Complete = len(p.Missing) == 0
	l.found = append(l.found, p)
	return nil
}

func (l *inspection) here(dgst digest.Digest) (size int64, here bool, err error) {
	size, here = l.c.Holds(dgst)
	if !here || !l.verify {
		return size, here, nil
	}
	err = l.c.Verify(l.ctx, dgst)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, cache.ErrMismatch):
		return 0, false, nil
	case err != nil:
		return 0, false, err
	}
	return size, true, nil
}

// Extent is all that the image of a digest consists of, of some platforms or, with nil,
// of all: what is here, and what is not.
func (c *Contents) Extent(ctx context.Context, dgst digest.Digest, platforms []string) (here, missing []cache.Reference, err error) {
	seen := make(map[digest.Digest]bool)
	c.walk(ctx, dgst, platforms, func(d digest.Digest, _ bool) {
		if size, ok := c.cache.Holds(d); ok && !seen[d] {
			here = append(here, cache.Reference{Digest: d, Size: size})
		}
		seen[d] = true
	})
	image, err := c.Image(ctx, dgst, platforms, false)
	for _, p := range image.Platforms {
		missing = append(missing, p.Missing...)
	}
	return here, missing, err
}

// walk visits a manifest and all that it needs, as far as manifests that are here
// tell. Of an index it visits the images of platforms, nil for all, and what is about
// them.
func (c *Contents) walk(ctx context.Context, root digest.Digest, platforms []string, visit func(d digest.Digest, manifest bool)) {
	visit(root, true)
	body, err := c.cache.Read(ctx, root, nil, oci.MaxManifest)
	if err != nil {
		return // what is not here tells nothing
	}
	d, err := oci.Describe(body)
	if err != nil {
		return
	}
	for _, r := range d.Refers {
		switch {
		case !d.Index:
			visit(r.Digest, false)
		case r.Platform == "" || oci.Wanted(platforms, r.Platform):
			c.walk(ctx, r.Digest, nil, visit)
		}
	}
}

// Children are the images of an index that is here whose platforms are wanted, and
// what is about them.
func (c *Contents) Children(ctx context.Context, index digest.Digest, platforms []string) map[digest.Digest]bool {
	refers := c.refers(ctx, index)
	if refers == nil {
		return nil
	}
	out := make(map[digest.Digest]bool)
	for _, r := range refers {
		if r.Platform == "" || oci.Wanted(platforms, r.Platform) {
			out[r.Digest] = true
		}
	}
	return out
}

// refers is what an index refers to, nil if it is not here or no index.
func (c *Contents) refers(ctx context.Context, index digest.Digest) []oci.Descriptor {
	body, err := c.cache.Read(ctx, index, nil, oci.MaxManifest)
	if err != nil {
		return nil
	}
	d, err := oci.Describe(body)
	if err != nil || !d.Index {
		return nil
	}
	return d.Refers
}

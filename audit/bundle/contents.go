package bundle

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tidemark/audit"
)

// version is that of the format. Another one is not read.
const version = 1

// Contents is the list of what is in a bundle, and what the log's key signs.
// Lists are sorted when it is encoded: images by ref, referrers by repository,
// subject and digest, content by digest.
type Contents struct {
	V       int    `json:"v"`
	Origin  string `json:"origin"`         // of the log, the name of its key
	LogSize int64  `json:"log_size"`       // entries of the checkpoint's tree
	Base    *Base  `json:"base,omitempty"` // only in a delta

	Images    []Image    `json:"images"`
	Referrers []Referrer `json:"referrers"`

	Manifests []Blob `json:"manifests"`
	Blobs     []Blob `json:"blobs"`
	Omitted   []Blob `json:"omitted"` // of a delta: needed, and left out because the base has it

	Checkpoint Blob   `json:"checkpoint"`
	Events     Events `json:"events"`
}

// A Base is the bundle that a delta goes on from.
type Base struct {
	Bundle  digest.Digest `json:"bundle,omitempty"` // its Contents.ID; "" if only the place in the log is known
	LogSize int64         `json:"log_size"`
}

// An Image is what a ref means.
type Image struct {
	Ref       string        `json:"ref"` // as audit.Ref.String writes it
	Digest    digest.Digest `json:"digest"`
	MediaType string        `json:"mediaType"`
	Size      int64         `json:"size"` // of the manifest

	// Platforms are those of an index whose manifests are in the bundle, with all
	// that they refer to. Without any, everything that the manifest refers to is.
	Platforms []string `json:"platforms,omitempty"`

	Index         int64     `json:"index"` // of the ref's last event, which says that Digest is served
	FirstSeen     time.Time `json:"first_seen"`
	LastConfirmed time.Time `json:"last_confirmed"`
}

// A Referrer is a manifest about another one, such as a signature.
type Referrer struct {
	Repository string             `json:"repository"` // with its upstream: docker.io/library/nginx
	Subject    digest.Digest      `json:"subject"`
	Descriptor ocispec.Descriptor `json:"descriptor"` // as upstream's list of referrers has it
}

// A Blob is content by its digest, of a manifest or of what manifests refer to.
type Blob struct {
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"`
}

// Events are the bytes of all events and their proofs.
type Events struct {
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"`
	Count  int64         `json:"count"`
}

// ID is the digest of the list as it is written. The list has the digests of all
// that is in the bundle but its key, so that it names the bundle. It is "" for a
// list that cannot be written.
func (c Contents) ID() digest.Digest {
	list, err := c.encode()
	if err != nil {
		return ""
	}
	return digest.FromBytes(list)
}

// encode returns the one form in which the list is written. c is not changed.
func (c Contents) encode() ([]byte, error) {
	sorted := func(blobs []Blob) []Blob {
		blobs = append([]Blob{}, blobs...)
		slices.SortFunc(blobs, func(a, b Blob) int { return cmp.Compare(a.Digest, b.Digest) })
		return blobs
	}
	c.Manifests, c.Blobs, c.Omitted = sorted(c.Manifests), sorted(c.Blobs), sorted(c.Omitted)
	c.Images = append([]Image{}, c.Images...)
	slices.SortFunc(c.Images, func(a, b Image) int { return cmp.Compare(a.Ref, b.Ref) })
	for i := range c.Images {
		im := &c.Images[i]
		im.Platforms = slices.Sorted(slices.Values(im.Platforms))
		im.FirstSeen = im.FirstSeen.UTC().Truncate(time.Millisecond)
		im.LastConfirmed = im.LastConfirmed.UTC().Truncate(time.Millisecond)
	}
	c.Referrers = append([]Referrer{}, c.Referrers...)
	slices.SortFunc(c.Referrers, func(a, b Referrer) int {
		return cmp.Or(cmp.Compare(a.Repository, b.Repository), cmp.Compare(a.Subject, b.Subject), cmp.Compare(a.Descriptor.Digest, b.Descriptor.Digest))
	})
	line, err := marshal(c)
	return bytes.TrimSuffix(line, []byte("\n")), err
}

// marshal encodes v as compact JSON, a line, in which < is not escaped: others
// have to write the same bytes.
func marshal(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	err := enc.Encode(v)
	return b.Bytes(), err
}

// unmarshal decodes one value without keys that v does not have.
func unmarshal(data []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return err
	}
	if _, err := dec.Token(); err != io.EOF {
		return fmt.Errorf("something follows the value")
	}
	return nil
}

// parse reads a list that encode wrote, and checks all that can be told from it
// alone.
func parse(list []byte) (Contents, error) {
	var form struct {
		V int `json:"v"`
	}
	if err := json.Unmarshal(list, &form); err == nil && form.V != version {
		return Contents{}, wrong(contentsEntry, "has version %d; this tidemark reads version %d", form.V, version)
	}
	var c Contents
	if err := unmarshal(list, &c); err != nil {
		return Contents{}, wrong(contentsEntry, "%v", err)
	}
	again, err := c.encode()
	if err != nil {
		return Contents{}, wrong(contentsEntry, "%v", err)
	}
	if !bytes.Equal(list, again) {
		return Contents{}, wrong(contentsEntry, "is not in the one form that a list has: compact, sorted, with every key in its place; byte %d differs", firstDifference(list, again))
	}
	if err := c.check(); err != nil {
		return Contents{}, err
	}
	return c, nil
}

// firstDifference is where a and b, which differ, begin to.
func firstDifference(a, b []byte) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return n
}

// check finds what contradicts itself in a list that is sorted.
func (c Contents) check() error {
	fail := func(format string, args ...any) error { return wrong(contentsEntry, format, args...) }
	switch b := c.Base; {
	case b == nil && len(c.Omitted) > 0:
		return fail("omits %s without a base that could have it", c.Omitted[0].Digest)
	case b == nil:
	case b.Bundle != "" && legal(b.Bundle) != nil:
		return fail("base: %v", legal(b.Bundle))
	case b.LogSize < 0 || b.LogSize > c.LogSize:
		return fail("the log has %d entries, its base %d", c.LogSize, b.LogSize)
	}
	for _, b := range []Blob{c.Checkpoint, {c.Events.Digest, c.Events.Size}} {
		if err := legal(b.Digest); err != nil {
			return fail("%v", err)
		}
	}
	if c.Events.Size < 0 || c.Checkpoint.Size < 0 {
		return fail("a size below zero")
	}
	repositories := make(map[string]bool)
	for i, im := range c.Images {
		ref, err := audit.ParseRef(im.Ref)
		switch {
		case err != nil:
			return fail("image %v", err)
		case i > 0 && c.Images[i-1].Ref == im.Ref:
			return fail("image %s is listed twice", im.Ref)
		case im.MediaType == "":
			return fail("image %s has no media type", im.Ref)
		case im.Index < 0 || im.Index >= c.LogSize:
			return fail("image %s has its last event at %d, the log %d entries", im.Ref, im.Index, c.LogSize)
		}
		for j, p := range im.Platforms {
			if p == "" || j > 0 && im.Platforms[j-1] == p {
				return fail("image %s has the platform %q twice, or one without a name", im.Ref, p)
			}
		}
		repositories[ref.Upstream+"/"+ref.Repository] = true
	}
	for i, r := range c.Referrers {
		switch {
		case !repositories[r.Repository]:
			return fail("referrer %s is in %q, of which no image is in the bundle", r.Descriptor.Digest, r.Repository)
		case i > 0 && c.Referrers[i-1].Repository == r.Repository && c.Referrers[i-1].Descriptor.Digest == r.Descriptor.Digest:
			return fail("referrer %s of %s is listed twice", r.Descriptor.Digest, r.Repository)
		case r.Descriptor.MediaType == "":
			return fail("referrer %s has no media type", r.Descriptor.Digest)
		}
	}
	_, err := newClosure(c)
	return err
}

// legal tells whether d is a digest that content can have in a bundle.
func legal(d digest.Digest) error {
	if err := d.Validate(); err != nil {
		return fmt.Errorf("digest %.200q: %w", string(d), err)
	}
	if a := d.Algorithm(); a != digest.SHA256 && a != digest.SHA512 {
		return fmt.Errorf("digest %.200q: %w", string(d), digest.ErrDigestUnsupported)
	}
	return nil
}

// index is the index.json that belongs to the list. It names each image by its
// whole ref: the annotations are those that skopeo and containerd go by.
func (c Contents) index() []byte {
	ix := ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{},
	}
	for _, im := range c.Images {
		ix.Manifests = append(ix.Manifests, ocispec.Descriptor{
			MediaType: im.MediaType, Digest: im.Digest, Size: im.Size,
			Annotations: map[string]string{ocispec.AnnotationRefName: im.Ref, "io.containerd.image.name": im.Ref},
		})
	}
	line, err := marshal(ix)
	if err != nil {
		panic("bundle: index.json: " + err.Error()) // it is made of strings and numbers
	}
	return bytes.TrimSuffix(line, []byte("\n"))
}

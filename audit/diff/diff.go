// Package diff tells what changed between two manifests: platforms, layers,
// configuration, labels. It is pure: what it is to look at is handed in, and the
// same content always gives the same diff, byte for byte.
package diff

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

// A Read returns the bytes of content that a manifest refers to, or an error
// when they are not to be had. What cannot be read is told as such and makes the
// diff shallower, not wrong.
type Read func(d digest.Digest) ([]byte, error)

// A Diff is what changed from one digest to another. Docs: docs/formats.md.
type Diff struct {
	V   int  `json:"v"`
	Old Side `json:"old"`
	New Side `json:"new"`

	// Tier is how deep the comparison went on every platform that changed: 0 the
	// descriptors, 1 the manifests, 2 the configurations (AUDIT.md, A5).
	Tier int `json:"tier"`

	Class   string   `json:"class,omitempty"`   // what the manifests alone tell, "" if nothing
	Signals []string `json:"signals,omitempty"` // became_index, became_single, recompressed, entrypoint_changed, …

	Platforms    Platforms       `json:"platforms"`
	Attestations Attestations    `json:"attestations"`
	Changed      []PlatformDiff  `json:"changed,omitempty"` // the platforms that changed, in order of their names
	Unreadable   []digest.Digest `json:"unreadable,omitempty"`
}

// A Side is one of the two manifests.
type Side struct {
	Digest    digest.Digest `json:"digest"`
	MediaType string        `json:"media_type"`
	Size      int64         `json:"size"`
}

// Platforms are named os/arch[/variant][:os.version]; the one of a manifest that
// stands for itself is read from its configuration, or "".
type Platforms struct {
	Added     []string `json:"added"`
	Removed   []string `json:"removed"`
	Changed   []string `json:"changed"`
	Unchanged []string `json:"unchanged"`
}

// Attestations counts the children of an index that are about other children.
type Attestations struct {
	Old     int `json:"old"`
	New     int `json:"new"`
	Changed int `json:"changed"` // digests of New that are not in Old
}

// A PlatformDiff is what changed on one platform.
type PlatformDiff struct {
	Platform string        `json:"platform"`
	Old      digest.Digest `json:"old"` // of the image manifest
	New      digest.Digest `json:"new"`

	Layers *Layers `json:"layers,omitempty"` // tier 1
	Config *Config `json:"config,omitempty"` // tier 2
}

// Layers are compared in order.
type Layers struct {
	Common       int     `json:"common"`        // at the beginning, the same in both
	FirstDiffers int     `json:"first_differs"` // index of the first that differs, -1 for none
	Shared       []Layer `json:"shared"`        // in both, wherever they stand
	Added        []Layer `json:"added"`
	Removed      []Layer `json:"removed"`
	Reordered    bool    `json:"reordered"`
	Bytes        int64   `json:"bytes"` // to fetch for who has the old image
	BytesDelta   int64   `json:"bytes_delta"`
}

// A Layer is a layer of an image. Index is where it stands in the new image, or
// in the old one if it was removed.
type Layer struct {
	Index  int           `json:"index"`
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"`
}

// A Config is what changed in the configuration of an image.
type Config struct {
	Changed bool          `json:"changed"` // its digest is another
	Fields  []FieldChange `json:"fields"`
	Labels  []FieldChange `json:"labels"`

	// Identity has the annotations or, without, the labels that say what the image is and
	// where it comes from, changed or not: a rebuild has the same revision and version.
	Identity []FieldChange `json:"identity,omitempty"`

	// BaseOnly tells that a layer below those of the image's own steps is another, while
	// these steps are the same.
	BaseOnly bool `json:"base_only,omitempty"`

	Created     *Created `json:"created,omitempty"`
	History     Counts   `json:"history"`              // how many steps
	FirstStep   string   `json:"first_step,omitempty"` // the first step of the new image's history that differs
	SameDiffIDs bool     `json:"same_diff_ids"`        // the unpacked layers are equal
}

// A FieldChange is one value that was added, removed or changed. Secrets are
// masked.
type FieldChange struct {
	Field string  `json:"field"` // Env, Entrypoint, …; the key of a label
	Key   string  `json:"key,omitempty"`
	Old   *string `json:"old,omitempty"` // nil: it was not there
	New   *string `json:"new,omitempty"`
}

// Created are the times that the images claim to be from.
type Created struct {
	Old *time.Time `json:"old,omitempty"`
	New *time.Time `json:"new,omitempty"`
}

// Counts are numbers of both sides.
type Counts struct {
	Old int `json:"old"`
	New int `json:"new"`
}

// The classes that manifests alone can tell, as AUDIT.md, A8.4, has them.
const (
	Repackaged      = "repackaged"
	AttestationOnly = "attestation_only"
	PlatformAdded   = "platform_added"
	PlatformRemoved = "platform_removed"
	Rebuild         = "rebuild"
)

// Between compares two manifests. It is an error when one of them cannot be read
// or is none; whatever they refer to may be missing.
func Between(old, new digest.Digest, read Read) (*Diff, error) {
	c := &comparing{read: read}
	a, err := c.image(old)
	if err != nil {
		return nil, fmt.Errorf("old manifest: %w", err)
	}
	b, err := c.image(new)
	if err != nil {
		return nil, fmt.Errorf("new manifest: %w", err)
	}
	return c.compare(a, b), nil
}

// Encode is the diff as it is stored.
func (d *Diff) Encode() []byte {
	b, err := json.Marshal(d)
	if err != nil {
		panic("diff: " + err.Error())
	}
	return b
}

// Parse reads a stored diff.
func Parse(b []byte) (*Diff, error) {
	var d Diff
	if err := json.Unmarshal(b, &d); err != nil {
		return nil, fmt.Errorf("diff: %w", err)
	}
	if d.V != version {
		return nil, fmt.Errorf("diff has version %d, not %d", d.V, version)
	}
	return &d, nil
}

const version = 1

// errSchema1 reports manifests that say nothing that could be compared.
var errSchema1 = errors.New("a manifest of schema 1 cannot be compared")

// Says returns what the images that changed say under a key of Identity, "" where they
// say nothing or not all the same.
func (d *Diff) Says(key string) (old, new string) {
	text := func(s *string) string {
		if s == nil {
			return ""
		}
		return *s
	}
	for i, p := range d.Changed {
		o, n := "", ""
		if p.Config != nil {
			if at := slices.IndexFunc(p.Config.Identity, func(f FieldChange) bool { return f.Field == key }); at >= 0 {
				o, n = text(p.Config.Identity[at].Old), text(p.Config.Identity[at].New)
			}
		}
		if i == 0 {
			old, new = o, n
		}
		if o != old {
			old = ""
		}
		if n != new {
			new = ""
		}
	}
	return old, new
}

// Created is the latest time that a new image claims to be from, zero if none does.
func (d *Diff) Created() (latest time.Time) {
	for _, p := range d.Changed {
		if p.Config != nil && p.Config.Created != nil && p.Config.Created.New != nil && p.Config.Created.New.After(latest) {
			latest = *p.Config.Created.New
		}
	}
	return latest
}

// Totals are the numbers of a diff, layers summed over the platforms compared.
type Totals struct {
	Shared, Added, Removed int
	BytesDelta             int64
	ConfigChanged          []string // names of the fields, each once
}

// Totals returns the numbers of d.
func (d *Diff) Totals() Totals {
	var t Totals
	seen := make(map[string]bool)
	note := func(field string) {
		if !seen[field] {
			seen[field] = true
			t.ConfigChanged = append(t.ConfigChanged, field)
		}
	}
	for _, p := range d.Changed {
		if p.Layers != nil {
			t.Shared += len(p.Layers.Shared)
			t.Added += len(p.Layers.Added)
			t.Removed += len(p.Layers.Removed)
			t.BytesDelta += p.Layers.BytesDelta
		}
		if p.Config != nil {
			for _, f := range p.Config.Fields {
				note(f.Field)
			}
			if len(p.Config.Labels) > 0 {
				note("Labels")
			}
		}
	}
	return t
}

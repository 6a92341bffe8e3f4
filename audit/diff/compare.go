package diff

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	dockerList      = "application/vnd.docker.distribution.manifest.list.v2+json"
	attestationType = "vnd.docker.reference.type"
)

// comparing is one comparison.
type comparing struct {
	read       Read
	unreadable []digest.Digest
}

// An image is a manifest as far as it was read.
type image struct {
	Side
	index        bool
	children     []child // of an index, or the manifest itself
	attestations []digest.Digest
}

// A child is the image of one platform.
type child struct {
	platform string
	digest   digest.Digest
	manifest *ocispec.Manifest // nil until it is read
}

func (c *comparing) image(d digest.Digest) (*image, error) {
	body, err := c.read(d)
	if err != nil {
		return nil, err
	}
	var m struct {
		SchemaVersion int                  `json:"schemaVersion"`
		MediaType     string               `json:"mediaType"`
		Manifests     []ocispec.Descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(body, &m); err != nil {
		return nil, fmt.Errorf("%s: %w", d, err)
	}
	if m.SchemaVersion == 1 {
		return nil, fmt.Errorf("%s: %w", d, errSchema1)
	}
	im := &image{Side: Side{Digest: d, MediaType: m.MediaType, Size: int64(len(body))}}
	im.index = m.Manifests != nil || m.MediaType == ocispec.MediaTypeImageIndex || m.MediaType == dockerList
	if !im.index {
		if im.MediaType == "" {
			im.MediaType = ocispec.MediaTypeImageManifest
		}
		var manifest ocispec.Manifest
		if err := json.Unmarshal(body, &manifest); err != nil {
			return nil, fmt.Errorf("%s: %w", d, err)
		}
		im.children = []child{{digest: d, manifest: &manifest}}
		return im, nil
	}
	if im.MediaType == "" {
		im.MediaType = ocispec.MediaTypeImageIndex
	}
	for _, desc := range m.Manifests {
		if desc.Annotations[attestationType] != "" {
			im.attestations = append(im.attestations, desc.Digest)
			continue
		}
		im.children = append(im.children, child{platform: platformName(desc.Platform), digest: desc.Digest})
	}
	return im, nil
}

func platformName(p *ocispec.Platform) string {
	if p == nil {
		return ""
	}
	name := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		name += "/" + p.Variant
	}
	if p.OSVersion != "" {
		name += ":" + p.OSVersion
	}
	return name
}

// compare compares from the outside in, and stops where nothing differs.
func (c *comparing) compare(a, b *image) *Diff {
	d := &Diff{V: version, Old: a.Side, New: b.Side, Tier: 2}
	switch {
	case !a.index && b.index:
		d.Signals = append(d.Signals, "became_index")
	case a.index && !b.index:
		d.Signals = append(d.Signals, "became_single")
	}
	c.namePlatforms(a, b)
	olds := byPlatform(a.children)
	news := byPlatform(b.children)
	for _, name := range sortedNames(olds, news) {
		o, had := olds[name]
		n, has := news[name]
		switch {
		case !had:
			d.Platforms.Added = append(d.Platforms.Added, name)
		case !has:
			d.Platforms.Removed = append(d.Platforms.Removed, name)
		case o.digest == n.digest:
			d.Platforms.Unchanged = append(d.Platforms.Unchanged, name)
		default:
			d.Platforms.Changed = append(d.Platforms.Changed, name)
			d.Changed = append(d.Changed, c.platform(d, name, o, n))
		}
	}
	for _, list := range []*[]string{&d.Platforms.Added, &d.Platforms.Removed, &d.Platforms.Changed, &d.Platforms.Unchanged} {
		if *list == nil {
			*list = []string{}
		}
	}
	d.Attestations = Attestations{Old: len(a.attestations), New: len(b.attestations)}
	for _, at := range b.attestations {
		if !slices.Contains(a.attestations, at) {
			d.Attestations.Changed++
		}
	}
	d.Unreadable = c.unreadable
	d.classify()
	return d
}

// namePlatforms gives a manifest that stands for itself the platform that its
// configuration says, if the other side is an index to find it in.
func (c *comparing) namePlatforms(a, b *image) {
	for _, pair := range [][2]*image{{a, b}, {b, a}} {
		single, other := pair[0], pair[1]
		if single.index || !other.index {
			continue
		}
		ch := &single.children[0]
		for _, o := range other.children {
			if o.digest == ch.digest {
				ch.platform = o.platform
				break
			}
		}
		if ch.platform == "" {
			if cfg := c.config(ch.manifest); cfg != nil {
				ch.platform = platformName(&cfg.Platform)
			}
		}
	}
}

// byPlatform maps platforms to their images. A platform that stands in an index
// twice is told apart by its place, for clients take the first.
func byPlatform(children []child) map[string]child {
	m := make(map[string]child, len(children))
	for i, ch := range children {
		name := ch.platform
		if _, twice := m[name]; twice {
			name = fmt.Sprintf("%s#%d", name, i)
		}
		m[name] = ch
	}
	return m
}

func sortedNames(ms ...map[string]child) []string {
	var names []string
	for _, m := range ms {
		for n := range m {
			if !slices.Contains(names, n) {
				names = append(names, n)
			}
		}
	}
	slices.Sort(names)
	return names
}

// manifest reads the manifest of a child.
func (c *comparing) manifest(ch child) *ocispec.Manifest {
	if ch.manifest != nil {
		return ch.manifest
	}
	var m ocispec.Manifest
	if !c.readJSON(ch.digest, &m) {
		return nil
	}
	return &m
}

func (c *comparing) config(m *ocispec.Manifest) *imageConfig {
	if m == nil || m.Config.Digest == "" {
		return nil
	}
	var cfg imageConfig
	if !c.readJSON(m.Config.Digest, &cfg) {
		return nil
	}
	return &cfg
}

// readJSON reads content into v, or notes that it cannot be.
func (c *comparing) readJSON(d digest.Digest, v any) bool {
	body, err := c.read(d)
	if err == nil {
		err = json.Unmarshal(body, v)
	}
	if err != nil && !slices.Contains(c.unreadable, d) {
		c.unreadable = append(c.unreadable, d)
	}
	return err == nil
}

func (c *comparing) platform(d *Diff, name string, o, n child) PlatformDiff {
	p := PlatformDiff{Platform: name, Old: o.digest, New: n.digest}
	om, nm := c.manifest(o), c.manifest(n)
	if om == nil || nm == nil {
		d.Tier = 0
		return p
	}
	p.Layers = compareLayers(om.Layers, nm.Layers)
	if om.Config.Digest == nm.Config.Digest {
		p.Config = &Config{SameDiffIDs: true, Fields: []FieldChange{}, Labels: []FieldChange{}}
		return p
	}
	oc, nc := c.config(om), c.config(nm)
	if oc == nil || nc == nil {
		d.Tier = min(d.Tier, 1)
		return p
	}
	p.Config = compareConfigs(oc, nc)
	return p
}

func compareLayers(old, new []ocispec.Descriptor) *Layers {
	l := &Layers{FirstDiffers: -1, Shared: []Layer{}, Added: []Layer{}, Removed: []Layer{}}
	for l.Common < len(old) && l.Common < len(new) && old[l.Common].Digest == new[l.Common].Digest {
		l.Common++
	}
	if l.Common < len(old) || l.Common < len(new) {
		l.FirstDiffers = l.Common
	}
	has := func(list []ocispec.Descriptor, d digest.Digest) bool {
		return slices.ContainsFunc(list, func(o ocispec.Descriptor) bool { return o.Digest == d })
	}
	var kept, stayed []digest.Digest
	for i, n := range new {
		l.BytesDelta += n.Size
		if has(old, n.Digest) {
			l.Shared = append(l.Shared, Layer{i, n.Digest, n.Size})
			stayed = append(stayed, n.Digest)
			continue
		}
		l.Added = append(l.Added, Layer{i, n.Digest, n.Size})
		l.Bytes += n.Size
	}
	for i, o := range old {
		l.BytesDelta -= o.Size
		if has(new, o.Digest) {
			kept = append(kept, o.Digest)
			continue
		}
		l.Removed = append(l.Removed, Layer{i, o.Digest, o.Size})
	}
	l.Reordered = !slices.Equal(kept, stayed)
	return l
}

// classify says what the change looks like, first match wins, and signals what
// deserves a look.
func (d *Diff) classify() {
	onlySame := func() bool { return len(d.Platforms.Added)+len(d.Platforms.Removed) == 0 }
	switch {
	case onlySame() && len(d.Changed) > 0 && d.every(samePackage):
		d.Class = Repackaged
		if d.every(func(p PlatformDiff) bool { return p.Layers.FirstDiffers < 0 }) {
			break
		}
		d.Signals = append(d.Signals, "recompressed")
	case onlySame() && len(d.Changed) == 0 && (d.Attestations.Changed > 0 || d.Attestations.Old != d.Attestations.New):
		d.Class = AttestationOnly
	case onlySame() && len(d.Changed) == 0:
		d.Class = Repackaged // the same images under another index
	case len(d.Changed) == 0 && len(d.Platforms.Removed) == 0:
		d.Class = PlatformAdded
	case len(d.Changed) == 0 && len(d.Platforms.Added) == 0:
		d.Class = PlatformRemoved
	case len(d.Changed) > 0 && d.every(sameSource):
		d.Class = Rebuild
	}
	if len(d.Platforms.Removed) > 0 {
		d.Signals = append(d.Signals, "platform_removed")
	}
	signals := make(map[string]bool)
	for _, p := range d.Changed {
		if p.Config != nil {
			p.Config.signal(signals)
		}
		if p.Layers != nil && len(p.Layers.Shared) == 0 && len(p.Layers.Removed) > 0 {
			signals["no_shared_layers"] = true
		}
	}
	names := make([]string, 0, len(signals))
	for s := range signals {
		names = append(names, s)
	}
	slices.Sort(names)
	d.Signals = append(d.Signals, names...)
}

func (d *Diff) every(is func(PlatformDiff) bool) bool {
	return !slices.ContainsFunc(d.Changed, func(p PlatformDiff) bool { return !is(p) })
}

// samePackage tells a platform whose configuration and unpacked layers are the
// same: only how they are wrapped differs (R10).
func samePackage(p PlatformDiff) bool {
	return p.Layers != nil && p.Config != nil && p.Config.SameDiffIDs && len(p.Config.Fields)+len(p.Config.Labels) == 0 &&
		(!p.Config.Changed || p.Layers.FirstDiffers >= 0) && p.Config.History.Old == p.Config.History.New && p.Config.FirstStep == ""
}

// sameSource tells a platform that says it was built from the same source: its
// revision and version, as far as it has them, are the same.
func sameSource(p PlatformDiff) bool {
	if p.Config == nil {
		return false
	}
	said := false
	for _, f := range p.Config.Identity {
		if f.Field != ocispec.AnnotationRevision && f.Field != ocispec.AnnotationVersion {
			continue
		}
		if f.Old == nil || f.New == nil || *f.Old != *f.New {
			return false
		}
		said = true
	}
	return said
}

// isSecret tells names of variables whose values are nobody's business.
func isSecret(name string) bool {
	name = strings.ToLower(name)
	for _, word := range []string{"pass", "pwd", "secret", "token", "apikey", "api_key", "private", "credential", "auth", "access_key", "accesskey"} {
		if strings.Contains(name, word) {
			return true
		}
	}
	return false
}

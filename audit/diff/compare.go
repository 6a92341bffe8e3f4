package diff

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	dockerList    = "application/vnd.docker.distribution.manifest.list.v2+json"
	referenceType = "vnd.docker.reference.type"
	attestation   = "attestation-manifest"
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
	platform    string
	digest      digest.Digest
	annotations map[string]string // of its descriptor in the index
	manifest    *ocispec.Manifest // nil until it is read
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
		if IsAttestation(desc) {
			im.attestations = append(im.attestations, desc.Digest)
			continue
		}
		im.children = append(im.children, child{platform: platformName(desc.Platform), digest: desc.Digest, annotations: desc.Annotations})
	}
	return im, nil
}

// IsAttestation tells the children that no client takes for a platform: those
// that say what they are and name none. One that names a platform is an image,
// whatever it says.
func IsAttestation(d ocispec.Descriptor) bool {
	named := d.Platform != nil && (d.Platform.OS != "unknown" || d.Platform.Architecture != "unknown")
	return d.Annotations[referenceType] == attestation && !named
}

// platformsMost bounds the platforms that are looked into. Real indexes have a
// dozen or two.
const platformsMost = 256

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
			if len(d.Changed) < platformsMost {
				d.Changed = append(d.Changed, c.platform(d, name, o, n))
			} else {
				d.Tier = 0
			}
		}
	}
	for _, list := range []*[]string{&d.Platforms.Added, &d.Platforms.Removed, &d.Platforms.Changed, &d.Platforms.Unchanged} {
		if *list == nil {
			*list = []string{}
		}
	}
	d.Attestations = Attestations{Old: len(a.attestations), New: len(b.attestations)}
	had := setOf(a.attestations, func(d digest.Digest) digest.Digest { return d })
	for _, at := range b.attestations {
		if !had[at] {
			d.Attestations.Changed++
		}
	}
	d.Unreadable = c.unreadable
	d.classify()
	return d
}

func setOf[T any](list []T, key func(T) digest.Digest) map[digest.Digest]bool {
	set := make(map[digest.Digest]bool, len(list))
	for _, v := range list {
		set[key(v)] = true
	}
	return set
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
	var body []byte
	err := d.Validate() // a manifest can call anything a digest
	if err == nil {
		body, err = c.read(d)
	}
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
	if om.Config.Digest == nm.Config.Digest && p.Layers.FirstDiffers < 0 {
		p.Config = &Config{SameDiffIDs: true, Fields: []FieldChange{}, Labels: []FieldChange{}}
		return p
	}
	oc, nc := c.config(om), c.config(nm)
	if oc == nil || nc == nil {
		d.Tier = min(d.Tier, 1)
		return p
	}
	p.Config = compareConfigs(oc, nc)
	p.Config.Identity = compareIdentities(says(oc, om, o), says(nc, nm, n))
	p.Config.BaseOnly = baseOnly(oc, nc, om, nm)
	p.Config.Changed = om.Config.Digest != nm.Config.Digest
	// Only an image says what its layers are unpacked: an artifact has no such list.
	ids := len(oc.RootFS.DiffIDs)
	p.Config.SameDiffIDs = p.Config.SameDiffIDs && ids > 0 && ids == len(om.Layers) && ids == len(nm.Layers)
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
	digestOf := func(d ocispec.Descriptor) digest.Digest { return d.Digest }
	inOld, inNew := setOf(old, digestOf), setOf(new, digestOf)
	var kept, stayed []digest.Digest
	for i, n := range new {
		l.BytesDelta += n.Size
		if inOld[n.Digest] {
			l.Shared = append(l.Shared, Layer{i, n.Digest, n.Size})
			stayed = append(stayed, n.Digest)
			continue
		}
		l.Added = append(l.Added, Layer{i, n.Digest, n.Size})
		l.Bytes += n.Size
	}
	for i, o := range old {
		l.BytesDelta -= o.Size
		if inNew[o.Digest] {
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
		if p.Layers != nil {
			p.Layers.signal(signals)
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

// samePackage tells a platform on which only the wrapping differs: configuration
// and layers are the same, or the layers are the same when unpacked and the
// configuration says the same (R10).
func samePackage(p PlatformDiff) bool {
	if p.Layers == nil || p.Config == nil || !p.Config.SameDiffIDs {
		return false
	}
	c := p.Config
	if !c.Changed {
		return true
	}
	return p.Layers.FirstDiffers >= 0 && len(c.Fields)+len(c.Labels) == 0 && c.History.Old == c.History.New && c.FirstStep == ""
}

// says is what an image says that it is: its labels, those of its base among them,
// and before them the annotations of its manifest and of its place in the index,
// which are the builder's own.
func says(cfg *imageConfig, m *ocispec.Manifest, c child) map[string]string {
	out := make(map[string]string)
	for _, from := range []map[string]string{cfg.Config.Labels, m.Annotations, c.annotations} {
		maps.Copy(out, from)
	}
	return out
}

// An image that grows or shrinks by so many percent, and so many bytes, is worth a word.
const (
	sizePercent = 25
	sizeBytes   = 1 << 20
)

// signal notes what deserves a look.
func (l *Layers) signal(out map[string]bool) {
	old := -l.BytesDelta
	for _, list := range [][]Layer{l.Shared, l.Added} {
		for _, layer := range list {
			old += layer.Size
		}
	}
	if old <= 0 || max(l.BytesDelta, -l.BytesDelta) < sizeBytes {
		return
	}
	if pct := l.BytesDelta * 100 / old; pct >= sizePercent || pct <= -sizePercent {
		out[fmt.Sprintf("size_delta_pct:%+d", pct)] = true
	}
}

// baseOnly tells an image of which a layer below those of its own steps is another,
// while these steps are the same.
func baseOnly(oc, nc *imageConfig, om, nm *ocispec.Manifest) bool {
	own := 0 // layers of the steps at the end that are the same
	same := 0
	for ; same < len(oc.History) && same < len(nc.History); same++ {
		o, n := oc.History[len(oc.History)-1-same], nc.History[len(nc.History)-1-same]
		if o.CreatedBy != n.CreatedBy || o.EmptyLayer != n.EmptyLayer {
			break
		}
		if !n.EmptyLayer {
			own++
		}
	}
	base := len(nm.Layers) - own
	if same == 0 || base <= 0 || len(om.Layers) < own {
		return false // steps that are all the same say nothing about where the base ends
	}
	differs := compareLayers(om.Layers, nm.Layers).FirstDiffers
	return differs >= 0 && differs < base
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

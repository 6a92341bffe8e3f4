package diff

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Platforms, and what they are called.

func platformName(p *ocispec.Platform) string {
	if p == nil {
		return ""
	}
	name := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		name += "/" + p.Variant
	}
	name = Canonical(name)
	if p.OSVersion != "" {
		name += ":" + p.OSVersion
	}
	return name
}

// Canonical is the name of a platform, os/arch[/variant], as clients understand it: they
// take several spellings for the same, and the first image that has one of them
// (containerd/platforms, Normalize).
func Canonical(name string) string {
	parts := strings.SplitN(strings.ToLower(name), "/", 3)
	if len(parts) < 2 {
		return name
	}
	variant := ""
	if len(parts) == 3 {
		variant = parts[2]
	}
	if parts[0] == "macos" {
		parts[0] = "darwin"
	}
	switch parts[1] {
	case "i386":
		parts[1], variant = "386", ""
	case "x86_64", "x86-64", "amd64":
		parts[1] = "amd64"
		if variant == "v1" {
			variant = ""
		}
	case "aarch64", "arm64":
		parts[1] = "arm64"
		switch variant {
		case "8", "v8", "v8.0":
			variant = ""
		case "9", "9.0", "v9.0":
			variant = "v9"
		}
	case "armhf":
		parts[1], variant = "arm", "v7"
	case "armel":
		parts[1], variant = "arm", "v6"
	case "arm":
		switch variant {
		case "", "7":
			variant = "v7"
		case "5", "6", "8":
			variant = "v" + variant
		}
	}
	return strings.TrimSuffix(parts[0]+"/"+parts[1]+"/"+variant, "/")
}

// namePlatforms gives a manifest that stands for itself the platform that its
// configuration says. Two such manifests are of the same one, that of the new:
// a client that had the old one gets the new one.
func (c *comparing) namePlatforms(a, b *image) {
	if !a.index && !b.index {
		name := c.ownPlatform(b)
		if name == "" {
			name = c.ownPlatform(a)
		}
		a.children[0].platform, b.children[0].platform = name, name
		return
	}
	for _, pair := range [][2]*image{{a, b}, {b, a}} {
		single, other := pair[0], pair[1]
		if single.index {
			continue
		}
		ch := &single.children[0]
		i := slices.IndexFunc(other.children, func(o child) bool { return o.digest == ch.digest })
		if i >= 0 {
			ch.platform = other.children[i].platform
		} else {
			ch.platform = c.ownPlatform(single)
		}
	}
}

// ownPlatform is what the configuration of a manifest that stands for itself
// says, "" if it says nothing.
func (c *comparing) ownPlatform(im *image) string {
	cfg := c.config(im.children[0].manifest)
	if cfg == nil || cfg.OS == "" {
		return ""
	}
	return platformName(&cfg.Platform)
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
	all := make(map[string]child)
	for _, m := range ms {
		maps.Copy(all, m)
	}
	return slices.Sorted(maps.Keys(all))
}

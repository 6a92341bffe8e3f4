// Package config is what an operator can write, what it means when it is
// absent, and whether it makes sense.
//
// The comments on the fields are the manual: config.example.yaml is the same
// text, and a test keeps the two equal.
package config

import (
	"time"
)

// A Config is the whole configuration, valid once Load has returned it.
type Config struct {
	// Data is the folder of all state: cached content, the ledger, keys.
	Data string `yaml:"data"`

	Registry Registry `yaml:"registry"`
	Admin    Admin    `yaml:"admin"`

	// DefaultUpstream answers for names that name no upstream: nginx, library/nginx.
	DefaultUpstream string `yaml:"default_upstream"`

	// Upstreams are the registries that are mirrored, by name. The well-known
	// ones are there unless this key is present.
	Upstreams map[string]*Upstream `yaml:"upstreams"`

	Tags  Tags  `yaml:"tags"`
	Cache Cache `yaml:"cache"`
	Audit Audit `yaml:"audit"`
}

// Registry is the address that clients are pointed at.
type Registry struct {
	Listen string `yaml:"listen"`
	TLS    TLS    `yaml:"tls"`
}

// TLS says how the registry proves who it is.
type TLS struct {
	// Mode is none (loopback only, unless insecure), files, or internal: a CA of
	// tidemark's own, whose certificate is data/tls/internal-ca.crt.
	Mode string `yaml:"mode"`
	// Insecure allows plain HTTP off loopback.
	Insecure bool `yaml:"insecure"`
	// CertFile and KeyFile are for mode files; read again when they change.
	CertFile string `yaml:"cert_file"`
	KeyFile  string `yaml:"key_file"`
	// Hosts are the names and addresses to have certificates for, in mode
	// internal. On loopback they default to localhost and the address itself.
	Hosts []string `yaml:"hosts"`
}

// The modes of TLS.
const (
	TLSNone     = "none"
	TLSFiles    = "files"
	TLSInternal = "internal"
)

// Admin is the address for operators.
type Admin struct {
	Listen string `yaml:"listen"`
	// TokenFile holds the token that calls must carry; required off loopback.
	TokenFile string `yaml:"token_file"`
	Token     Secret `yaml:"-"` // read from TokenFile
}

// Upstream is a registry that is mirrored.
type Upstream struct {
	// Endpoints are its addresses, tried in order. Default: https:// and the
	// upstream's name.
	Endpoints []string `yaml:"endpoints"`
	// Hosts are request Host names that mean this upstream, besides its own.
	Hosts []string `yaml:"hosts"`
	// Username and the password in PasswordFile are sent to this upstream and
	// its token realm, and nowhere else.
	Username     string `yaml:"username"`
	PasswordFile string `yaml:"password_file"`
	// Password can stand here only as ${VARIABLE} of the environment.
	Password Secret `yaml:"password"`
	// TokenRealms are hosts that may issue its tokens, besides its own domain.
	TokenRealms []string `yaml:"token_realms"`
	// CAFile holds certificates to trust instead of the system's.
	CAFile string `yaml:"ca_file"`
	// Insecure skips the verification of its certificate.
	Insecure bool `yaml:"insecure"`
	// Shared allows any client to have content that was fetched with these
	// credentials. Without it such an upstream is refused off loopback.
	Shared bool `yaml:"shared"`
}

// Tags says how long an answer about a tag is good.
type Tags struct {
	// TTL is for how long upstream is not asked again; 0s asks at every pull,
	// once for all who wait at the same time.
	TTL Duration `yaml:"ttl"`
	// Refresh is blocking (ask upstream first) or background (answer at once
	// with what is known, ask behind).
	Refresh string `yaml:"refresh"`
}

// The ways to refresh.
const (
	RefreshBlocking   = "blocking"
	RefreshBackground = "background"
)

// Cache bounds what is stored.
type Cache struct {
	// MaxBytes is a size, or a share of the file system that data is on.
	MaxBytes Size `yaml:"max_bytes"`
	// MinFree is left to others on that file system.
	MinFree Size `yaml:"min_free"`
	// Prefetch begins to fetch an image's layers when its manifest is asked for.
	Prefetch bool `yaml:"prefetch"`
}

// Audit is about the ledger.
type Audit struct {
	// Origin is the name of the log. Default: tidemark/<random>, made once. A
	// log that exists keeps its name.
	Origin string `yaml:"origin"`
}

// Default returns the configuration of an empty file.
func Default() *Config {
	return &Config{
		Data:            "./tidemark-data",
		Registry:        Registry{Listen: "127.0.0.1:5050", TLS: TLS{Mode: TLSNone}},
		Admin:           Admin{Listen: "127.0.0.1:5051"},
		DefaultUpstream: "docker.io",
		Tags:            Tags{TTL: Duration(60 * time.Second), Refresh: RefreshBlocking},
		Cache:           Cache{MaxBytes: Size{Percent: 80}, MinFree: Size{Bytes: 1 << 30}, Prefetch: true},
	}
}

// wellKnown are the upstreams of a configuration that has none.
func wellKnown() map[string]*Upstream {
	m := map[string]*Upstream{
		"docker.io": {
			Endpoints:   []string{"https://registry-1.docker.io"},
			Hosts:       []string{"registry-1.docker.io", "index.docker.io"},
			TokenRealms: []string{"auth.docker.io"},
		},
	}
	for _, name := range []string{"ghcr.io", "quay.io", "registry.k8s.io", "gcr.io", "mcr.microsoft.com", "public.ecr.aws", "lscr.io", "nvcr.io", "registry.gitlab.com"} {
		m[name] = &Upstream{}
	}
	m["lscr.io"].TokenRealms = []string{"ghcr.io"}                // it stands in front of ghcr.io
	m["registry.gitlab.com"].TokenRealms = []string{"gitlab.com"} // the same domain; said for clarity
	return m
}

// complete puts in what follows from other keys: the well-known upstreams when
// there are none, and what is known of a well-known one whose entry leaves it out.
func (c *Config) complete() {
	known := wellKnown()
	if c.Upstreams == nil {
		c.Upstreams = known
	}
	for name, u := range c.Upstreams {
		k := known[name]
		if k == nil {
			k = &Upstream{}
		}
		if u.Endpoints == nil {
			u.Endpoints = k.Endpoints
		}
		if u.Hosts == nil {
			u.Hosts = k.Hosts
		}
		if u.TokenRealms == nil {
			u.TokenRealms = k.TokenRealms
		}
		if len(u.Endpoints) == 0 {
			u.Endpoints = []string{"https://" + name}
		}
	}
}

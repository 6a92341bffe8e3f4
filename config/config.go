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
	Watch Watch `yaml:"watch"`

	// Notify are the places that are told of what happens to tags.
	Notify []Notify `yaml:"notify"`
}

// Registry is the address that clients are pointed at.
type Registry struct {
	Listen string `yaml:"listen"`
	TLS    TLS    `yaml:"tls"`
	Auth   Auth   `yaml:"auth"`

	// Push is deny, or pass: to the upstream, with the client's own credentials.
	// What a push makes of a tag is in the ledger.
	Push string `yaml:"push"`

	// Views are more addresses, at which the registry is as it was at a time, asof, or
	// right after an entry of the log, at. They are for clients that take no mirror
	// with a path.
	Views []View `yaml:"views"`

	Intercept Intercept `yaml:"intercept"`
}

// View is an address that is bound to a moment of the past.
type View struct {
	Listen string `yaml:"listen"`
	// AsOf is a date, which is its first second in UTC, or a time.
	AsOf Time `yaml:"asof"`
	// At is the index of an entry of the log, instead.
	At *int `yaml:"at"`
}

// Auth says who may pull.
type Auth struct {
	// Mode is none, basic (users of the htpasswd file) or passthrough: the
	// client's own rights at the upstream decide, which is asked.
	Mode string `yaml:"mode"`
	// HtpasswdFile has the users of mode basic, with bcrypt hashes (htpasswd -B);
	// read again when it changes.
	HtpasswdFile string `yaml:"htpasswd_file"`
}

// The modes of Auth.
const (
	AuthNone        = "none"
	AuthBasic       = "basic"
	AuthPassthrough = "passthrough"
)

// What becomes of pushes.
const (
	PushDeny = "deny"
	PushPass = "pass"
)

// Intercept is a proxy for HTTPS (CONNECT): Docker reaches every registry through
// it under its own name. It answers for the hosts of the upstreams, with
// certificates of a CA of its own, data/tls/intercept-ca.crt.
type Intercept struct {
	// Listen is its address; "" is off.
	Listen string `yaml:"listen"`
	// Tunnel are other hosts that clients may reach through it, untouched, such as
	// auth.docker.io. All others are refused.
	Tunnel []string `yaml:"tunnel"`
}

// TLS says how the registry proves who it is.
type TLS struct {
	// Mode is none (loopback only, unless insecure), files, acme, or internal: a CA
	// of tidemark's own, whose certificate is data/tls/internal-ca.crt.
	Mode string `yaml:"mode"`
	// Insecure allows plain HTTP off loopback.
	Insecure bool `yaml:"insecure"`
	// CertFile and KeyFile are for mode files; read again when they change.
	CertFile string `yaml:"cert_file"`
	KeyFile  string `yaml:"key_file"`
	// ClientCAFile holds the CA of clients, in any mode but none: who presents no
	// certificate from it is not answered. Read again when it changes.
	ClientCAFile string `yaml:"client_ca_file"`
	// Hosts are the names to have certificates for, in modes acme and internal; in
	// internal addresses too. There they default to localhost and the address
	// itself on loopback.
	Hosts []string `yaml:"hosts"`
	// Email is told to the ACME server, which warns there before a certificate
	// expires.
	Email string `yaml:"email"`
	// ACMEDirectory is the address of the ACME server.
	ACMEDirectory string `yaml:"acme_directory"`
	// ACMECAFile holds certificates to trust instead of the system's when the ACME
	// server itself is asked.
	ACMECAFile string `yaml:"acme_ca_file"`
	// ACMEHTTP is where the server is answered that checks a name on port 80
	// (HTTP-01), while it does. The other way (TLS-ALPN-01) is the registry's own
	// address, which must then be reached on port 443.
	ACMEHTTP string `yaml:"acme_http"`
}

// The modes of TLS.
const (
	TLSNone     = "none"
	TLSFiles    = "files"
	TLSACME     = "acme"
	TLSInternal = "internal"
)

// Admin is the address for operators.
type Admin struct {
	Listen string `yaml:"listen"`
	// TokenFile holds the token that calls must carry; required off loopback.
	TokenFile string `yaml:"token_file"`
	Token     Secret `yaml:"-"` // read from TokenFile
	// FeedTokenFile holds the token that readers of /feed.atom and /feed.json give as the
	// parameter token, instead of the other.
	FeedTokenFile string `yaml:"feed_token_file"`
	FeedToken     Secret `yaml:"-"` // read from FeedTokenFile
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
	// DockerConfig is a config.json of Docker to take them from instead, credential
	// helpers included, which are how ECR, GCR and ACR are logged in to.
	DockerConfig string `yaml:"docker_config"`
	// TokenRealms are hosts that may issue its tokens, besides its own domain.
	TokenRealms []string `yaml:"token_realms"`
	// CAFile holds certificates to trust instead of the system's.
	CAFile string `yaml:"ca_file"`
	// Insecure skips the verification of its certificate.
	Insecure bool `yaml:"insecure"`
	// Kind is registry, or mirror: its tags lag, so that flips are confirmed for
	// longer before they count.
	Kind string `yaml:"kind"`
	// History is where upstream tells what its tags meant in the past, for tidemark
	// backfill: oci (distribution-spec#606, and another tidemark), quay or chainguard.
	// Default: quay of quay.io, chainguard of cgr.dev, oci of others.
	History string `yaml:"history"`
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
	// Offline never contacts an upstream: what is here is served, what is not is
	// told as such.
	Offline bool `yaml:"offline"`
}

// Where upstreams tell of their past.
const (
	HistoryOCI        = "oci"
	HistoryQuay       = "quay"
	HistoryChainguard = "chainguard"
)

// The kinds of upstreams.
const (
	KindRegistry = "registry"
	KindMirror   = "mirror"
)

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
	// Scrub reads what is stored and compares it with its digests.
	Scrub Scrub `yaml:"scrub"`
}

// Scrub is when and how fast what is stored is read again.
type Scrub struct {
	// Every is how often; 0s is never, but when asked to (tidemark cache scrub).
	Every Duration `yaml:"every"`
	// Rate bounds what is read a second.
	Rate Size `yaml:"rate"`
}

// Audit is about the ledger.
type Audit struct {
	// Origin is the name of the log. Default: tidemark/<random>, made once. A
	// log that exists keeps its name.
	Origin string `yaml:"origin"`

	// Preset ends rules with those for a common situation: homelab, balanced,
	// strict, airgap (which is offline, too) or ci-private. docs/policies.md has
	// what they do.
	Preset string `yaml:"preset"`

	// Rules say what is served when a tag moves; the first that matches counts.
	// A tag that no rule matches is observed.
	Rules []Rule `yaml:"rules"`

	// Denied are digests that are never served for a tag, whatever the rules say: what the
	// tag meant before is. Who has had one already is told (exposure.found).
	Denied []string `yaml:"denied"`

	// Allowed are digests that need not wait under cooldown or hold.
	Allowed []string `yaml:"allowed"`

	// Keep is the history whose bytes are kept while there is room.
	Keep Keep `yaml:"keep"`

	// FlapWindow is the time in which a tag that goes there and back has not moved
	// twice, but flaps.
	FlapWindow Duration `yaml:"flap_window"`

	// DeleteAfter is when a tag that upstream no longer has is believed to be
	// deleted.
	DeleteAfter DeleteAfter `yaml:"delete_after"`

	// GapFactor times watch.interval without an answer is a gap, which is recorded; of a
	// tag that is asked about less often, times its own interval.
	GapFactor int `yaml:"gap_factor"`

	// Gaps is tell (with a warning in the answer) or refuse, when a pull as of a time is
	// about one of which it is not certain what the tag meant.
	Gaps string `yaml:"gaps"`

	// ExposureKeep is how long who pulled what is kept.
	ExposureKeep Duration `yaml:"exposure_keep"`

	// OCITagHistory answers /v2/<name>/_oci/tag-history/<tag>, a proposal
	// (distribution-spec#606), like _tidemark/tag-history.
	OCITagHistory bool `yaml:"oci_tag_history"`

	// Publish copies checkpoints to other places, as witnesses of the log.
	Publish []Publish `yaml:"publish"`
}

// What becomes of pulls as of an uncertain time.
const (
	GapsTell   = "tell"
	GapsRefuse = "refuse"
)

// Rule is what to do about some tags.
type Rule struct {
	// Name is how events call the rule. Default: its conditions.
	Name string `yaml:"name"`
	// Match is a pattern of references: ? and * stand for characters within a
	// component, ** for any.
	Match string `yaml:"match"`
	// Tag is a regular expression (RE2) that is found in the tag.
	Tag string `yaml:"tag"`
	// FullVersion is true for tags that look like a full version only, false for
	// others only.
	FullVersion *bool `yaml:"full_version"`
	// Mode is observe, alert, cooldown, hold, immutable or deny.
	Mode string `yaml:"mode"`
	// Age is how old a digest must be in mode cooldown.
	Age Duration `yaml:"age"`
	// Tenure is how long it must have been what the tag meant, unless it still is.
	// Default: the age, at most 24h.
	Tenure *Duration `yaml:"tenure"`
	// MaxLag is how long the tag may be served as it was before that is reported.
	// Default: four times the age.
	MaxLag Duration `yaml:"max_lag"`
	// OnStarved is what follows: keep, or longest_tenure to serve what stood longest.
	OnStarved string `yaml:"on_starved"`
	// OnNew is serve, or refuse_until_age for tags never seen before.
	OnNew string `yaml:"on_new"`
	// OnDeleted is serve, or refuse when upstream has deleted the tag.
	OnDeleted string `yaml:"on_deleted"`
	// Escalate is what of a move has the digest held until it is approved, in any mode:
	// trust.downgraded, trust.changed, repo.burst, digest.aliased, user_to_root,
	// entrypoint_changed, platform_removed.
	Escalate []string `yaml:"escalate"`
	// Bypass are the classes of moves that need not wait under cooldown or hold:
	// repackaged, attestation_only, base_refresh.
	Bypass []string `yaml:"bypass"`
}

// Keep bounds the history whose bytes are kept.
type Keep struct {
	// Digests are the newest digests of a tag that are kept; 0 of these, or of
	// the days, keeps none.
	Digests int `yaml:"digests"`
	// Days are for how long after the tag meant them.
	Days int `yaml:"days"`
}

// DeleteAfter says when a tag is believed to be deleted.
type DeleteAfter struct {
	// Observations are the answers that it is not there, in a row.
	Observations int `yaml:"observations"`
	// Over is the time that they span at least.
	Over Duration `yaml:"over"`
}

// Watch says which tags are asked about although nobody pulls them. They are asked
// about with HEAD, which rate limits do not count, and never more often than
// leaves the clients of this mirror their share of an upstream's limit.
type Watch struct {
	// Interval is how often a tag is asked about of which nothing is known yet; one
	// that moves often is asked about more often, one that stands still less.
	Interval Duration `yaml:"interval"`
	// Floor is the shortest time between two questions.
	Floor Duration `yaml:"floor"`
	// Ceiling is the longest.
	Ceiling Duration `yaml:"ceiling"`
	// Refs are references, or patterns of them: ? and * stand for characters within a
	// component, ** for any. Tags are found in upstream's list, repositories among those
	// that are known here: docker.io/library/nginx:1.27, quay.io/prometheus/*:latest.
	Refs []string `yaml:"refs"`
	// Seen watches every tag that a client pulled in the last 30 days, too; not with
	// registry.auth.mode passthrough, where only clients may know what they pull.
	Seen bool `yaml:"seen"`
}

// Publish is a place that checkpoints are copied to.
type Publish struct {
	// Type is file or webhook.
	Type string `yaml:"type"`
	// Path is the file that always has the newest checkpoint.
	Path string `yaml:"path"`
	// URL is where each checkpoint is posted to. What of it may be secret is not
	// shown.
	URL Webhook `yaml:"url"`
	// SecretFile holds the key that signs posts (Standard Webhooks).
	SecretFile string `yaml:"secret_file"`
	Secret     Secret `yaml:"-"` // read from SecretFile
}

// The types of Publish.
const (
	PublishFile    = "file"
	PublishWebhook = "webhook"
)

// Default returns the configuration of an empty file.
func Default() *Config {
	return &Config{
		Data: "./tidemark-data",
		Registry: Registry{
			Listen: "127.0.0.1:5050", Push: PushDeny, Auth: Auth{Mode: AuthNone},
			TLS: TLS{Mode: TLSNone, ACMEDirectory: "https://acme-v02.api.letsencrypt.org/directory", ACMEHTTP: ":80"},
		},
		Admin:           Admin{Listen: "127.0.0.1:5051"},
		DefaultUpstream: "docker.io",
		Tags:            Tags{TTL: Duration(60 * time.Second), Refresh: RefreshBlocking},
		Cache:           Cache{MaxBytes: Size{Percent: 80}, MinFree: Size{Bytes: 1 << 30}, Prefetch: true, Scrub: Scrub{Every: Duration(30 * 24 * time.Hour), Rate: Size{Bytes: 32 << 20}}},
		Watch:           Watch{Interval: Duration(15 * time.Minute), Floor: Duration(time.Minute), Ceiling: Duration(24 * time.Hour), Seen: true},
		Audit: Audit{
			Keep: Keep{Digests: 5, Days: 90}, FlapWindow: Duration(15 * time.Minute),
			DeleteAfter: DeleteAfter{Observations: 3, Over: Duration(time.Hour)}, GapFactor: 3, Gaps: GapsTell, ExposureKeep: Duration(90 * 24 * time.Hour),
		},
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
	m["quay.io"].History = HistoryQuay
	m["lscr.io"].TokenRealms = []string{"ghcr.io"}                // it stands in front of ghcr.io
	m["registry.gitlab.com"].TokenRealms = []string{"gitlab.com"} // the same domain; said for clarity
	return m
}

// complete puts in what follows from other keys: the well-known upstreams when
// there are none, and what is known of a well-known one whose entry leaves it out.
func (c *Config) complete() {
	if k := &c.Audit.Keep; k.Digests == 0 || k.Days == 0 {
		*k = Keep{}
	}
	known := wellKnown()
	if c.Upstreams == nil {
		c.Upstreams = known
	}
	for name, u := range c.Upstreams {
		k := known[name]
		if k == nil {
			k = &Upstream{}
		}
		if name == "cgr.dev" {
			k.History = HistoryChainguard
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
		if u.Kind == "" {
			u.Kind = KindRegistry
		}
		if u.History == "" {
			u.History = k.History
		}
		if u.History == "" {
			u.History = HistoryOCI
		}
	}
}

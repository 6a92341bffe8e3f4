package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"net/http"
	"net/url"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/rs/zerolog"

	"tidemark/audit"
	"tidemark/audit/notify"
	"tidemark/audit/publish"
	"tidemark/audit/sqlite"
	"tidemark/cache"
	"tidemark/cache/disk"
	"tidemark/config"
	"tidemark/proxy"
	"tidemark/proxy/admin"
	"tidemark/proxy/ca"
	"tidemark/proxy/carry"
	"tidemark/proxy/front"
	"tidemark/proxy/intercept"
	"tidemark/proxy/oci"
	"tidemark/proxy/route"
	"tidemark/proxy/upstream"
	"tidemark/proxy/watch"
)

// A server is all rooms, joined. wire makes it, Run runs it, Close lets go of
// the data folder.
type server struct {
	cfg  *config.Config
	load func() (*config.Config, error) // reads the configuration again
	hup  <-chan os.Signal               // when to

	unloaded atomic.Bool // the last reload failed

	log  zerolog.Logger
	data *dataFolder

	store      *sqlite.Store
	origin     string // of the log
	identities map[string]string
	ledger     *audit.Ledger
	signer     *audit.Signer
	publisher  *publish.Publisher
	notifier   *notify.Dispatcher
	exposures  *audit.Exposures
	conditions *audit.Conditions
	snapshots  *audit.Snapshots

	cache    *cache.Cache
	contents *proxy.Contents
	carrier  *carry.Carrier
	scrubber *proxy.Scrubber
	keeper   *proxy.Keeper
	watcher  *watch.Watcher // nil when nothing is watched
	events   *admin.Events

	internal *front.Internal // nil unless registry.tls.mode is internal
	acme     *front.ACME     // nil unless it is acme
	registry *front.Server
	views    []*front.Server // the registry as it was
	admin    *front.Server

	intercept   *intercept.Proxy // nil unless registry.intercept.listen is set
	interceptCA *ca.Authority
	intercepted *front.Server // answers what intercept hands out
}

// wire is the one place that turns configuration into rooms. It takes the data
// folder and both addresses; nothing runs yet.
func wire(ctx context.Context, cfg *config.Config, log zerolog.Logger) (_ *server, err error) {
	s := &server{cfg: cfg, log: log}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if s.data, err = openData(cfg.Data); err != nil {
		return nil, err
	}
	metrics := admin.NewMetrics()
	key, err := s.wireLog(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.wireCache(); err != nil {
		return nil, err
	}
	upstreams, table, err := wireUpstreams(cfg, metrics)
	if err != nil {
		return nil, err
	}
	s.contents = proxy.NewContents(upstreams, s.cache, s.noteReferrers, s.store.History)
	if err := s.wireLedger(ctx, key, upstreams, metrics); err != nil {
		return nil, err
	}
	s.carrier = carry.New(carry.Options{
		Cache: s.cache, Ledger: s.ledger, Signer: s.signer, Store: s.store,
		Upstream: func(name string) bool { return upstreams[name] != nil },
	})
	s.scrubber = proxy.NewScrubber(proxy.ScrubOptions{
		Contents: s.contents, Ledger: s.ledger, Memory: s.store, Tags: s.store.EachTag,
		Every: time.Duration(cfg.Cache.Scrub.Every), Rate: cfg.Cache.Scrub.Rate.Bytes, Log: s.log,
	})
	if err := s.wireWatcher(upstreams); err != nil {
		return nil, err
	}
	if err := s.wireRegistry(ctx, upstreams, table, metrics); err != nil {
		return nil, err
	}
	return s, s.wireAdmin(upstreams, table, metrics)
}

// wireLog opens the database and the key of the log, which may be missing: then
// it is nil.
func (s *server) wireLog(ctx context.Context) (*audit.Key, error) {
	key, err := audit.OpenKey(s.data.path, s.cfg.Audit.Origin, false)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	origin := s.cfg.Audit.Origin
	if key != nil {
		origin = key.Origin()
	} else if origin == "" {
		origin = audit.NewOrigin()
	}
	if s.store, err = sqlite.Open(ctx, s.data.file("audit.db"), origin); err != nil {
		return nil, err
	}
	if s.origin, err = s.store.Origin(ctx); err != nil {
		return nil, err
	}
	if s.origin != origin && (key != nil || s.cfg.Audit.Origin != "") {
		hint := ""
		if _, err := os.Stat(s.data.file("log.key.new")); err == nil {
			hint = "; a fork was begun and not finished: call tidemark log fork again"
		}
		return nil, fmt.Errorf("the ledger in %s is the log %s, but the key or audit.origin says %s: they do not belong together%s", s.data.path, s.origin, origin, hint)
	}
	if key != nil {
		return key, nil
	}
	tree, err := s.store.Tree(ctx)
	if err != nil {
		return nil, err
	}
	_, err = os.Stat(s.data.file("anchor"))
	fresh := tree.N == 0 && errors.Is(err, fs.ErrNotExist)
	if key, err = audit.OpenKey(s.data.path, s.origin, fresh); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return key, err
}

func (s *server) wireLedger(ctx context.Context, key *audit.Key, upstreams map[string]*upstream.Upstream, metrics *admin.Metrics) error {
	policy, errs := policyOf(s.cfg)
	if len(errs) > 0 {
		return errs[0]
	}
	s.signer = audit.NewSigner(s.store, key, s.data.file("anchor"), nil, s.log)
	if err := s.wirePublisher(); err != nil {
		return err
	}
	s.exposures = audit.NewExposures(s.store, time.Duration(s.cfg.Audit.ExposureKeep), nil, s.log)
	s.events = admin.NewEvents()
	s.keeper = proxy.NewKeeper(s.contents, func(ctx context.Context) iter.Seq2[audit.Tag, error] {
		return s.store.EachTag(ctx, audit.TagQuery{Kept: true})
	}, s.log)
	if err := s.wireNotify(ctx); err != nil {
		return err
	}
	open, err := s.store.Conditions(ctx, 1000)
	if err != nil {
		return err
	}
	s.conditions = audit.NewConditions(audit.ConditionOptions{Open: open, Store: s.store, Notify: s.notifier.Recipients, Told: s.notifier.Grown, Log: s.log})
	s.ledger = audit.New(audit.Options{
		Notify: s.notifier.Recipients,
		Exposed: func(ctx context.Context, d digest.Digest) (audit.Exposed, error) {
			s.exposures.Flush(ctx) // who had it a moment ago counts
			list, err := s.store.Exposures(ctx, d)
			return audit.CountExposed(list), err
		},
		Store: s.store, Memory: s.store, Policy: policy, Compare: s.contents.Compare,
		TTL:        time.Duration(s.cfg.Tags.TTL),
		Background: s.cfg.Tags.Refresh == config.RefreshBackground,
		Log:        s.log,
		Answered:   func(ref audit.Ref, err error) { s.conditions.Answered(ref.Upstream, err) },
		Recorded: func(index int64, e audit.Event) {
			s.signer.Grown()
			s.keeper.Recorded(e)
			s.events.Grown()
			s.notifier.Grown()
			s.remute(e)
			s.cache.Repin()
			metrics.Recorded(e)
			logEvent(s.log, index, e)
		},
	})
	s.snapshots = audit.NewSnapshots(s.ledger, s.store, s.store, s.contents.Keep, s.log)
	s.identities = make(map[string]string)
	for name, u := range upstreams {
		s.identities[name] = u.Identity()
	}
	if err := s.ledger.Begin(ctx, s.identities); err != nil {
		// Images are served nevertheless; /readyz tells.
		s.log.Error().Err(err).Msg("what changed since the last start could not be recorded")
	}
	return nil
}

func (s *server) wirePublisher() error {
	var sinks []publish.Sink
	for _, p := range s.cfg.Audit.Publish {
		if p.Type == config.PublishFile {
			sinks = append(sinks, publish.File{Path: p.Path, Follows: s.signer.Follows})
			continue
		}
		hook, err := publish.NewWebhook(string(p.URL), string(p.Secret))
		if err != nil {
			return err
		}
		sinks = append(sinks, hook)
	}
	s.publisher = publish.New(s.origin, s.signer.Last, s.store, sinks, s.log)
	s.signer.OnSigned(s.publisher.Signed)
	return nil
}

// logEvent writes the one line of an event.
func logEvent(log zerolog.Logger, index int64, e audit.Event) {
	line := log.Info().Str("kind", string(e.Type))
	if e.Ref != (audit.Ref{}) {
		line = line.Str("upstream", e.Ref.Upstream).Str("repo", e.Ref.Repository).Str("tag", e.Ref.Tag)
	}
	if e.New != nil {
		line = line.Str("digest", e.New.Digest.String())
	}
	if e.Old != nil {
		line = line.Str("prev", e.Old.Digest.String())
	}
	line.Int64("index", index).Msg("recorded")
}

// pins tells the cache what the ledger wants kept, and what is being exported.
func (s *server) pins(ctx context.Context) iter.Seq2[cache.Pin, error] {
	return func(yield func(cache.Pin, error) bool) {
		for _, p := range s.carrier.Pins() {
			if !yield(p, nil) {
				return
			}
		}
		for k, err := range s.kept(ctx) {
			pin := cache.Pin{Digest: k.Digest, Firm: k.Firm}
			if err == nil && k.Platforms != nil {
				pin.Children = s.contents.Children(ctx, k.Digest, k.Platforms)
			}
			if !yield(pin, err) {
				return
			}
		}
	}
}

func (s *server) wireCache() error {
	store, err := disk.Open(s.data.path)
	if err != nil {
		return fmt.Errorf("cache: %w", err)
	}
	total, _, err := disk.Space(s.data.path)
	if err != nil {
		return fmt.Errorf("cache: %w", err)
	}
	size := s.cfg.Cache.MaxBytes
	s.cache = cache.New(cache.Options{
		Store: store,
		Budget: func(stored int64) int64 {
			// A share is of what the cache could have: what it holds and what is free.
			_, free, err := disk.Space(s.data.path)
			if err != nil {
				free = total
			}
			return size.Of(free + stored)
		},
		MinFree:  s.cfg.Cache.MinFree.Of(total),
		Describe: describe,
		Pins:     s.pins,
		Log:      s.log,
	})
	return nil
}

// describe tells the cache what package oci knows of manifests.
func describe(manifest []byte) (cache.Description, error) {
	d, err := oci.Describe(manifest)
	if err != nil {
		return cache.Description{}, err
	}
	out := cache.Description{MediaType: d.MediaType, Index: d.Index}
	for _, r := range d.Refers {
		out.Refers = append(out.Refers, cache.Reference{Digest: r.Digest, Size: r.Size})
	}
	return out, nil
}

func wireUpstreams(cfg *config.Config, metrics *admin.Metrics) (map[string]*upstream.Upstream, *route.Table, error) {
	upstreams := make(map[string]*upstream.Upstream)
	var routes []route.Upstream
	for name, u := range cfg.Upstreams {
		o := upstream.Options{
			Name: name, TokenRealms: u.TokenRealms,
			Insecure: u.Insecure, UserAgent: "tidemark/" + version(), Offline: cfg.Tags.Offline,
			Observe: func(status int) { metrics.Upstream(name, status) },
		}
		for _, e := range u.Endpoints {
			v, err := url.Parse(e)
			if err != nil {
				return nil, nil, err
			}
			o.Endpoints = append(o.Endpoints, v)
		}
		switch {
		case u.Username != "":
			o.Credentials, o.Identity = upstream.Static(u.Username, string(u.Password)), upstream.IdentityOf(u.Username)
		case u.DockerConfig != "":
			o.Credentials, o.Identity = upstream.DockerConfig(u.DockerConfig, loginHosts(name, o.Endpoints)...), "docker-config"
		}
		var err error
		if o.RootCAs, err = certPool(u.CAFile); err != nil {
			return nil, nil, err
		}
		upstreams[name] = upstream.New(o)
		routes = append(routes, route.Upstream{Name: name, Hosts: u.Hosts})
	}
	table, err := route.NewTable(cfg.DefaultUpstream, routes)
	return upstreams, table, err
}

// certPool reads certificates to trust, nil for the system's.
func certPool(file string) (*x509.CertPool, error) {
	if file == "" {
		return nil, nil
	}
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no PEM certificate", file)
	}
	return pool, nil
}

// loginHosts are the names under which somebody may have logged in to an upstream.
func loginHosts(name string, endpoints []*url.URL) []string {
	hosts := []string{name}
	if name == "docker.io" {
		hosts = append(hosts, "index.docker.io")
	}
	for _, e := range endpoints {
		if !slices.Contains(hosts, e.Host) {
			hosts = append(hosts, e.Host)
		}
	}
	return hosts
}

func (s *server) wireAdmin(upstreams map[string]*upstream.Upstream, table *route.Table, metrics *admin.Metrics) error {
	status := func() []admin.UpstreamStatus { return s.upstreamStatus(upstreams) }
	metrics.Watch(admin.Sources{Cache: s.cache.Stats, Upstreams: status, Tree: s.store.Tree, UnsignedSince: s.signer.UnsignedSince, HeldRefs: s.store.HeldRefs, Lag: s.lag, Outbox: s.store.OutboxCounts, Alerts: s.store.AlertCounts})
	o := admin.Options{
		Version: version(), Started: time.Now(), Origin: s.origin, Token: string(s.cfg.Admin.Token),
		Cache: s.cache, Views: s.store, Entries: s.store, Ledger: s.ledger, Contents: s.contents, Signer: s.signer, Metrics: metrics, Events: s.events,
		History: s.store.History, RefOf: s.store.RefOf, Exposures: s.store.Exposures, FlushExposures: s.exposures.Flush, Conditions: s.store.Conditions,
		Upstreams: status, Warnings: s.warnings, Offline: s.cfg.Tags.Offline, ParsePolicy: parsePolicy, CAs: make(map[string][]byte),
		Check: func(ctx context.Context, ref *audit.Ref) []admin.UpstreamCheck {
			return examineUpstreams(ctx, upstreams, ref)
		},
		Disk: s.disk, Registry: s.registryStatus(table),
		Claims: s.store.Claims, Chronicle: s.store.Chronicle, Backfill: s.backfill(upstreams),
		EachTag: s.store.EachTag, Kept: s.kept, Images: images{s}, Carrier: carrier{s}, Notifier: s.notifier, Requeue: s.store.Requeue, Alerts: s.store, Describe: s.describe, FeedToken: string(s.cfg.Admin.FeedToken),
		CheckPlatforms: oci.CheckPlatforms, ParseTime: oci.ParseTime,
		Failed: func(r *http.Request, err error) {
			s.log.Error().Err(err).Str("path", r.URL.Path).Msg("an answer could not be finished; the client was cut off")
		},
	}
	if s.internal != nil {
		o.CAs["internal"] = s.internal.CA().PEM()
	}
	if s.interceptCA != nil {
		o.CAs["intercept"] = s.interceptCA.PEM()
	}
	s.admin = front.New(front.Options{Addr: s.cfg.Admin.Listen, Handler: admin.New(o), Log: s.log, Drain: time.Second})
	return s.admin.Listen()
}

// registryStatus is how clients reach the registry.
func (s *server) registryStatus(table *route.Table) admin.RegistryStatus {
	r := s.cfg.Registry
	st := admin.RegistryStatus{
		URL: registryURL(s.cfg, s.registry.Addr().String()), TLS: r.TLS.Mode, Hosts: append([]string{}, r.TLS.Hosts...), Auth: r.Auth.Mode,
		Clients: r.TLS.ClientCAFile != "", Push: r.Push, Upstream: table.Hosts(),
	}
	if s.intercept != nil {
		st.Intercept = s.intercept.Address().String()
	}
	return st
}

func (s *server) disk() admin.DiskStatus {
	total, free, err := disk.Space(s.data.path)
	if err != nil {
		return admin.DiskStatus{} // a warning says why
	}
	return admin.DiskStatus{Total: total, Free: free, MinFree: s.cfg.Cache.MinFree.Of(total)}
}

func (s *server) upstreamStatus(upstreams map[string]*upstream.Upstream) []admin.UpstreamStatus {
	conditions := s.conditions.Now()
	var out []admin.UpstreamStatus
	for name, u := range upstreams {
		h := u.Health()
		st := admin.UpstreamStatus{Name: name, Healthy: h.Healthy, LastError: h.LastError}
		if c, ok := conditions[name]; ok {
			st.Condition = &c
		}
		if h.RateLimitRemaining >= 0 {
			st.RateLimitRemaining = &h.RateLimitRemaining
		}
		out = append(out, st)
	}
	slices.SortFunc(out, func(a, b admin.UpstreamStatus) int {
		return map[bool]int{true: -1, false: 1}[a.Name < b.Name]
	})
	return out
}

// warnings are what a person should look at although images are served.
func (s *server) warnings() []string {
	var out []string
	if err := s.signer.Err(); err != nil {
		out = append(out, "the log is not signed: "+err.Error())
	}
	if err := s.ledger.Unwritable(); err != nil {
		out = append(out, "the ledger could not be written: tags keep the digest recorded last, new tags are refused: "+err.Error())
	}
	if s.unloaded.Load() {
		out = append(out, "the configuration could not be reloaded: the policy is the one from before; the server's log and tidemark check say why")
	}
	for _, err := range s.publisher.Troubles() {
		out = append(out, "the checkpoint could not be published: "+err.Error())
	}
	for _, err := range s.notifier.Troubles() {
		out = append(out, "a notification was not taken, it is kept and sent again: "+err.Error())
	}
	if s.acme != nil {
		for _, h := range s.acme.Missing() {
			out = append(out, "there is no certificate for "+h+" yet; the server's log says what the ACME server said")
		}
	}
	if c := s.cache.Stats(); c.Ready && c.PinnedBytes > c.Budget {
		out = append(out, fmt.Sprintf("what is pinned has %s, more than cache.max_bytes allows, %s: nothing new is kept; tidemark cache ls --pins says what is", human(c.PinnedBytes), human(c.Budget)))
	}
	if total, free, err := disk.Space(s.data.path); err != nil {
		out = append(out, "free space is unknown: "+err.Error())
	} else if free < s.cfg.Cache.MinFree.Of(total) {
		out = append(out, fmt.Sprintf("the disk is full: %d MiB free, cache.min_free is %s; what does not fit is served without being kept", free>>20, s.cfg.Cache.MinFree))
	}
	return out
}

// Close lets go of everything that wire took.
func (s *server) Close() error {
	var err error
	if s.internal != nil {
		s.internal.Stop()
	}
	if s.acme != nil {
		s.acme.Stop()
	}
	if s.store != nil {
		err = s.store.Close()
	}
	if s.data != nil {
		err = errors.Join(err, s.data.Close())
	}
	return err
}

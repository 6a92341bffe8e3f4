package main

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"time"

	"tidemark/audit"
	"tidemark/config"
	"tidemark/proxy"
	"tidemark/proxy/admin"
	"tidemark/proxy/ca"
	"tidemark/proxy/front"
	"tidemark/proxy/intercept"
	"tidemark/proxy/oci"
	"tidemark/proxy/route"
	"tidemark/proxy/upstream"
)

// wireRegistry makes the registry that clients are pointed at, and takes its address.
func (s *server) wireRegistry(ctx context.Context, upstreams map[string]*upstream.Upstream, table *route.Table, metrics *admin.Metrics) error {
	users, login, err := s.wireLogin()
	if err != nil {
		return err
	}
	shared := make(map[string]bool)
	for name, u := range s.cfg.Upstreams {
		shared[name] = u.Shared
	}
	handler := proxy.New(proxy.Options{
		Table: table, Upstreams: upstreams, Ledger: s.ledger, Cache: s.cache,
		Login: login, Passthrough: s.cfg.Registry.Auth.Mode == config.AuthPassthrough, Shared: shared,
		Push: s.cfg.Registry.Push == config.PushPass, TTL: time.Duration(s.cfg.Tags.TTL),
		Prefetch: s.cfg.Cache.Prefetch, KnownTags: s.store.TagNames, Repositories: s.store.Repositories,
		History: s.store.History, Chronicle: s.store.Chronicle, OCITagHistory: s.cfg.Audit.OCITagHistory,
		KnownTagsAt: s.store.TagNamesAt, RefuseGaps: s.cfg.Audit.Gaps == config.GapsRefuse,
		KnownReferrers: s.store.Referrers, NoteReferrers: s.noteReferrers,
		Observe: func(r *http.Request, p proxy.Pull) {
			line := front.LineOf(r)
			line.Kind, line.Upstream, line.Repo, line.Tag = p.Kind.String(), p.Upstream, p.Repo, p.Tag
			line.Digest, line.Source, line.Err = p.Digest.String(), p.Source, p.Err
			s.visited(r, p)
			if p.Unrecorded != nil {
				s.log.Warn().Err(p.Unrecorded).Str("upstream", p.Upstream).Str("repo", p.Repo).Str("tag", p.Tag).
					Msg("what a push made of this tag is not in the ledger yet; the next pull of it is asked about")
			}
		},
	})
	tlsConfig, err := s.wireTLS(ctx)
	if err != nil {
		return err
	}
	access := func(l *front.Line) {
		metrics.Request(l.Kind, l.Upstream, l.Source, l.Status, l.Bytes, l.Dur)
		l.Log(&s.log)
	}
	s.registry = front.New(front.Options{Addr: s.cfg.Registry.Listen, Handler: handler, TLS: tlsConfig, Log: s.log, Access: access})
	if err := s.registry.Listen(); err != nil {
		return err
	}
	for _, v := range s.cfg.Registry.Views {
		server := front.New(front.Options{Addr: v.Listen, Handler: handler.View(momentOf(v)), TLS: tlsConfig, Log: s.log, Access: access})
		if err := server.Listen(); err != nil {
			return err
		}
		s.views = append(s.views, server)
	}
	if s.acme != nil { // its server looks for us there
		if err := s.acme.Manage(ctx); err != nil {
			return err
		}
	}
	return s.wireIntercept(handler, table, users, access)
}

// momentOf is the moment that a view is bound to.
func momentOf(v config.View) audit.Moment {
	if v.At != nil {
		return audit.AtIndex(int64(*v.At))
	}
	return audit.AtTime(v.AsOf.Time)
}

// wireIntercept makes the proxy by which clients reach registries under their own
// names.
func (s *server) wireIntercept(handler http.Handler, table *route.Table, users *front.Htpasswd, access func(*front.Line)) (err error) {
	if s.cfg.Registry.Intercept.Listen == "" {
		return nil
	}
	hosts := table.Hosts()
	names := intercept.CertificateHosts(hosts)
	s.interceptCA, err = ca.Open(s.data.file("tls"), "intercept", names...)
	var uncovered *ca.UncoveredError
	if errors.As(err, &uncovered) {
		s.log.Warn().Str("host", uncovered.Host).Str("ca", uncovered.Path).Msg("the CA of the intercepting proxy was made before this upstream was configured; it is made anew, and clients must trust the new one")
		s.interceptCA, err = ca.Renew(s.data.file("tls"), "intercept", names...)
	}
	if err != nil {
		return err
	}
	o := intercept.Options{Addr: s.cfg.Registry.Intercept.Listen, Hosts: hosts, Tunnel: s.cfg.Registry.Intercept.Tunnel, CA: s.interceptCA, Log: s.log}
	if users != nil {
		o.Login = users.Allows
	}
	s.intercept = intercept.New(o)
	if err := s.intercept.Listen(); err != nil {
		return err
	}
	s.intercepted = front.New(front.Options{
		Listener: s.intercept, Handler: intercept.Only(handler), TLS: s.intercept.TLS(), ConnContext: intercept.Context, Log: s.log, Access: access,
	})
	return nil
}

// wireLogin returns how clients log in to this server itself, nil if they need not,
// and the users if it has any.
func (s *server) wireLogin() (*front.Htpasswd, func(*http.Request) (string, bool), error) {
	if s.cfg.Registry.Auth.Mode != config.AuthBasic {
		return nil, func(r *http.Request) (string, bool) { return front.ClientName(r), true }, nil
	}
	users, err := front.OpenHtpasswd(s.cfg.Registry.Auth.HtpasswdFile, s.log)
	if err != nil {
		return nil, nil, err
	}
	return users, func(r *http.Request) (string, bool) {
		if c, ok := intercept.ClientOf(r.Context()); ok {
			return c.User, users.Allows(c.User, c.Password)
		}
		user, password, ok := r.BasicAuth()
		return user, ok && users.Allows(user, password)
	}, nil
}

// noteReferrers keeps what refers to manifests, for when upstream is silent.
func (s *server) noteReferrers(upstream, repository string, list []audit.Referrer) {
	ctx, cancel := context.WithTimeout(context.Background(), noteTime)
	defer cancel()
	if err := s.store.AddReferrers(ctx, upstream, repository, list); err != nil {
		s.log.Warn().Err(err).Str("upstream", upstream).Str("repo", repository).Msg("what refers to a manifest could not be noted; offline it will not be told")
	}
}

// noteTime bounds what a pull waits for such a note.
const noteTime = 5 * time.Second

// visited notes who resolved or fetched a manifest.
func (s *server) visited(r *http.Request, p proxy.Pull) {
	if p.Kind != oci.Manifest || p.Err != nil || p.Digest == "" || p.Tag == "" && !p.Sent {
		return
	}
	client, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		client = r.RemoteAddr
	}
	s.exposures.Note(audit.Visit{Digest: p.Digest, Client: client, User: p.User, Upstream: p.Upstream, Repository: p.Repo, Tag: p.Tag, Fetched: p.Sent})
}

func (s *server) wireTLS(ctx context.Context) (*tls.Config, error) {
	cfg, err := s.wireCertificates(ctx)
	if err != nil || s.cfg.Registry.TLS.ClientCAFile == "" {
		return cfg, err
	}
	return front.RequireClients(cfg, s.cfg.Registry.TLS.ClientCAFile, s.log)
}

// wireCertificates returns how the registry proves who it is, nil for plain HTTP.
func (s *server) wireCertificates(ctx context.Context) (cfg *tls.Config, err error) {
	t := s.cfg.Registry.TLS
	switch t.Mode {
	case config.TLSFiles:
		return front.Files(t.CertFile, t.KeyFile, s.log)
	case config.TLSACME:
		roots, err := certPool(t.ACMECAFile)
		if err != nil {
			return nil, err
		}
		acme := front.NewACME(front.ACMEOptions{
			Dir: s.data.file("tls"), Hosts: t.Hosts, Directory: t.ACMEDirectory, Email: t.Email, Roots: roots,
			HTTPAddr: t.ACMEHTTP, TLSAddr: s.cfg.Registry.Listen, Log: s.log,
		})
		if cfg, err = acme.Start(); err == nil {
			s.acme = acme
		}
	case config.TLSInternal:
		internal, err := front.NewInternal(s.data.file("tls"), t.Hosts, s.log)
		if err != nil {
			return nil, err
		}
		if cfg, err = internal.Start(ctx); err != nil {
			return nil, err
		}
		s.internal = internal
	}
	return cfg, err
}

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"github.com/rs/zerolog"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"tidemark/config"
)

type serveFlags struct {
	config, data, listen, admin string
	logFormat, logLevel         string
	offline                     bool
}

func newServe() *cobra.Command {
	var f serveFlags
	c := &cobra.Command{
		Use:   "serve",
		Short: "Run the mirror",
		Long: `Run the mirror until SIGTERM, which lets pulls under way finish. SIGHUP reads the
policy (audit.rules and what belongs to them) from the configuration again.

Without a configuration the registry is on 127.0.0.1:5050, the admin address on
127.0.0.1:5051, all state in ./tidemark-data, and the well-known registries are
mirrored.`,
		Example: `  tidemark serve
  tidemark serve -c /etc/tidemark.yaml --log-format json`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			hup := make(chan os.Signal, 1)
			signal.Notify(hup, syscall.SIGHUP) // from here to the end: it never kills
			useMoreProcessors()
			log, err := newLogger(f.logFormat, f.logLevel)
			if err != nil {
				return usage(err)
			}
			load := func() (*config.Config, error) { return loadConfig(f.config, f.override) }
			cfg, err := load()
			if err != nil {
				return err
			}
			s, err := wire(c.Context(), cfg, log)
			if err != nil {
				return err
			}
			s.load, s.hup = load, hup
			s.greet(os.Stdout)
			return errors.Join(s.Run(c.Context()), s.Close())
		},
	}
	c.Flags().StringVarP(&f.config, "config", "c", "", "configuration file; see config.example.yaml")
	c.Flags().StringVar(&f.data, "data", "", "folder of all state (data)")
	c.Flags().StringVar(&f.listen, "listen", "", "address of the registry (registry.listen)")
	c.Flags().StringVar(&f.admin, "admin", "", "address of the admin API (admin.listen)")
	c.Flags().BoolVar(&f.offline, "offline", false, "never contact an upstream (tags.offline)")
	c.Flags().StringVar(&f.logFormat, "log-format", "console", "json or console")
	c.Flags().StringVar(&f.logLevel, "log-level", "info", "debug, info, warn or error")
	return c
}

// useMoreProcessors gives the Go scheduler two processors for each CPU, unless
// the environment has its own mind. sendfile(2) and the disk keep a processor
// busy for as long as the kernel copies; with one for each CPU the readers of a
// fill wait for each other, and the fill for all of them. docs/measuring.md has
// what it is worth.
func useMoreProcessors() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(2 * runtime.GOMAXPROCS(0))
	}
}

// override puts what flags say over the file.
func (f *serveFlags) override(c *config.Config) {
	for _, o := range []struct {
		flag string
		key  *string
	}{{f.data, &c.Data}, {f.listen, &c.Registry.Listen}, {f.admin, &c.Admin.Listen}} {
		if o.flag != "" {
			*o.key = o.flag
		}
	}
	if f.offline {
		c.Tags.Offline = true
	}
}

func newLogger(format, level string) (zerolog.Logger, error) {
	var w io.Writer = os.Stderr
	switch format {
	case "json":
	case "console":
		w = zerolog.ConsoleWriter{Out: os.Stderr, TimeFormat: time.RFC3339, NoColor: !isTerminal(os.Stderr)}
	default:
		return zerolog.Logger{}, fmt.Errorf("--log-format %q is neither json nor console", format)
	}
	l, err := zerolog.ParseLevel(level)
	if err != nil || level == "" {
		return zerolog.Logger{}, fmt.Errorf("--log-level %q is not debug, info, warn or error", level)
	}
	return zerolog.New(w).Level(l).With().Timestamp().Logger(), nil
}

// greet prints what a person needs next.
func (s *server) greet(w io.Writer) {
	data, err := filepath.Abs(s.data.path)
	if err != nil {
		data = s.data.path
	}
	u := registryURL(s.cfg, s.registry.Addr().String())
	fmt.Fprintf(w, `tidemark %s
  registry  %s
  admin     http://%s
  data      %s
`, version(), u, s.admin.Addr(), data)
	if s.cfg.Registry.Auth.Mode == config.AuthNone {
		fmt.Fprintf(w, `
To have Docker pull through it, put these lines into /etc/docker/daemon.json and reload Docker:
  { "registry-mirrors": ["%s"] }
  systemctl reload docker
`, u)
	} else {
		fmt.Fprintf(w, "\nClients must log in (registry.auth.mode: %s). What each of them needs: tidemark setup CLIENT -c FILE\n", s.cfg.Registry.Auth.Mode)
	}
	if s.internal != nil {
		fmt.Fprintf(w, "\nClients must trust the internal CA: %s\n", s.internal.CA().Path())
	}
	if s.intercept != nil {
		fmt.Fprintf(w, "\nFor all registries under their own names: tidemark setup docker --intercept -c FILE\n  proxy     http://%s\n  CA        %s\n", s.intercept.Address(), s.interceptCA.Path())
	}
	fmt.Fprintln(w)
}

// reloadOnSignal reloads at every SIGHUP until ctx ends.
func (s *server) reloadOnSignal(ctx context.Context) {
	for {
		select {
		case <-s.hup:
			if err := s.reload(ctx); err != nil {
				s.unloaded.Store(true)
				s.log.Error().Err(err).Msg("the configuration was not reloaded; everything is as it was")
			}
		case <-ctx.Done():
			return
		}
	}
}

// reload takes over the policy of the configuration as it is now. What else has
// changed in it is told, and waits for a restart.
func (s *server) reload(ctx context.Context) error {
	cfg, err := s.load()
	if err != nil {
		return err
	}
	policy, errs := policyOf(cfg)
	if len(errs) > 0 {
		return errs[0]
	}
	if err := s.ledger.Reload(ctx, policy, s.identities, "SIGHUP"); err != nil {
		return err
	}
	was, is := *s.cfg, *cfg
	for _, c := range []*config.Config{&was, &is} {
		c.Audit.Preset, c.Audit.Rules, c.Audit.FlapWindow, c.Audit.DeleteAfter, c.Audit.GapFactor = "", nil, 0, config.DeleteAfter{}, 0
	}
	if was.String() != is.String() {
		s.log.Warn().Msg("the configuration has changed beyond the policy; that takes effect with the next start")
	}
	s.unloaded.Store(false)
	s.log.Info().Str("policy_sha256", policy.SHA256()).Msg("the policy was reloaded")
	return nil
}

// Run runs everything that lives long until ctx ends or something fails. The
// listeners stop first: what they serve may need the rest until the end.
func (s *server) Run(ctx context.Context) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	behindCtx, stopBehind := context.WithCancel(context.WithoutCancel(ctx))
	defer stopBehind()

	var behind errgroup.Group
	runs := []func(context.Context) error{
		s.cache.Run, s.ledger.Run, s.exposures.Run, s.conditions.Run, s.keeper.Run, s.snapshots.Run, s.scrubber.Run, s.notifier.Run,
	}
	if s.watcher != nil {
		runs = append(runs, s.watcher.Run)
	}
	for _, run := range runs {
		behind.Go(func() error {
			defer stop() // none of them ends by itself
			return run(behindCtx)
		})
	}
	signCtx, stopSigner := context.WithCancel(context.WithoutCancel(ctx))
	defer stopSigner()
	var signer errgroup.Group
	signer.Go(func() error { return s.signer.Run(signCtx) })
	signer.Go(func() error { return s.publisher.Run(signCtx) })

	fronts, frontCtx := errgroup.WithContext(ctx)
	fronts.Go(func() error { return s.registry.Run(frontCtx) })
	fronts.Go(func() error { return s.admin.Run(frontCtx) })
	for _, v := range s.views {
		fronts.Go(func() error { return v.Run(frontCtx) })
	}
	if s.intercept != nil {
		fronts.Go(func() error { return s.intercept.Run(frontCtx) })
		fronts.Go(func() error { return s.intercepted.Run(frontCtx) })
	}
	fronts.Go(func() error { s.reloadOnSignal(frontCtx); return nil })
	err := fronts.Wait()
	stopBehind()
	err = errors.Join(err, behind.Wait())
	stopSigner() // after the last event
	return errors.Join(err, signer.Wait())
}

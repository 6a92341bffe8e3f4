package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"tidemark/config"
)

func newSetup() *cobra.Command {
	c := &cobra.Command{
		Use:   "setup",
		Short: "Point a client at this server",
		Long: `Print what to write where so that a client pulls through this server, or write it
(--write): with a backup of every file that changes, touching nothing else in it,
and nothing at all when it is run again.`,
		Example: `  tidemark setup docker                           # prints
  tidemark setup containerd -c tidemark.yaml --write
  tidemark setup podman --registry https://mirror.example:5050 --ca ca.crt --write`,
		// Flags belong to clients: who misspells one is to be told of that.
		FParseErrWhitelist: cobra.FParseErrWhitelist{UnknownFlags: true},
		RunE:               func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.Args = func(_ *cobra.Command, args []string) error {
		if len(args) == 0 {
			return nil
		}
		var known []string
		for _, sub := range c.Commands() {
			known = append(known, sub.Name())
		}
		return fmt.Errorf("%q is no client that setup knows: %s; others name this server by its path, as docs/clients/others.md has it", args[0], strings.Join(known, ", "))
	}
	c.AddCommand(newSetupDocker(), newSetupContainerd(), newSetupPodman(), newSetupCRIO(), newSetupBuildKit(), newSetupK3s())
	return c
}

// setupFlags are the flags of setup's commands. No command has all of them.
type setupFlags struct {
	config, registry, ca, root string
	upstreams                  []string
	write, force, noFallback   bool
	intercept                  bool
	proxy                      string
}

// addSetup gives c the flags that all of setup's commands have, and has it print
// or write what lay plans.
func addSetup(c *cobra.Command, f *setupFlags, lay func(*site, *setupFlags) (*plan, error)) *cobra.Command {
	c.Args = cobra.NoArgs
	c.Flags().StringVarP(&f.config, "config", "c", "", "configuration file of the server")
	c.Flags().StringVar(&f.registry, "registry", "", "address at which clients reach the registry (default: from the configuration)")
	c.Flags().StringVar(&f.ca, "ca", "", "file with the CA certificate that clients must trust (default: the one in the server's data folder)")
	c.Flags().StringSliceVar(&f.upstreams, "upstream", nil, "only these of the configured upstreams")
	c.Flags().BoolVar(&f.write, "write", false, "write it, with a backup of every file that changes")
	c.Flags().StringVar(&f.root, "root", "/", "folder that all paths are below, for the image of a machine; with --write")
	c.RunE = func(c *cobra.Command, _ []string) error {
		if !f.write {
			for _, flag := range []string{"root", "force"} {
				if c.Flags().Changed(flag) {
					return usage(fmt.Errorf("--%s is for --write", flag))
				}
			}
		}
		cfg, err := loadConfig(f.config, nil)
		if err != nil {
			return err
		}
		s, err := newSite(cfg, f)
		if err != nil {
			return err
		}
		p, err := lay(s, f)
		if err != nil {
			return err
		}
		if f.write {
			return p.write(c.OutOrStdout(), f.root, time.Now())
		}
		p.print(c.OutOrStdout())
		return nil
	}
	return c
}

func addNoFallback(c *cobra.Command, f *setupFlags, usage string) {
	c.Flags().BoolVar(&f.noFallback, "no-fallback", false, usage)
}

func addForce(c *cobra.Command, f *setupFlags) {
	c.Flags().BoolVar(&f.force, "force", false, "replace files of somebody else, with a backup; with --write")
}

// A site is tidemark as its clients see it.
type site struct {
	cfg       *config.Config
	registry  *url.URL   // scheme and host, nothing else
	upstreams []string   // names, sorted
	ca        *authority // nil when there is none to trust beside the system's
	guessed   bool       // the registry's address is this machine's name, for want of a better one
}

// newSite is the site that the server's configuration and the flags describe. The
// CA is read only if it is to be written somewhere.
func newSite(cfg *config.Config, f *setupFlags) (*site, error) {
	s := &site{cfg: cfg}
	var err error
	if s.registry, err = s.address(f.registry); err != nil {
		return nil, usage(err)
	}
	if s.upstreams, err = s.chosen(f.upstreams); err != nil {
		return nil, usage(err)
	}
	data, err := filepath.Abs(cfg.Data)
	if err != nil {
		return nil, err
	}
	switch internal := cfg.Registry.TLS.Mode == config.TLSInternal; {
	case f.intercept: // another CA, and no client's business with the registry's address
		s.ca = &authority{file: filepath.Join(data, "tls", "intercept-ca.crt"), served: "intercept.crt"}
	case s.registry.Scheme == "http" && f.ca != "":
		return nil, usage(fmt.Errorf("--ca is for TLS, and %s is plain HTTP", s.registry))
	case s.registry.Scheme == "https" && (internal || f.ca != ""):
		s.ca = &authority{file: filepath.Join(data, "tls", "internal-ca.crt"), served: "internal.crt"}
	}
	if s.ca == nil {
		return s, nil
	}
	if f.ca != "" {
		s.ca.file, s.ca.served = f.ca, ""
	} else {
		s.ca.served = "http://" + clientAddr(cfg, cfg.Admin.Listen) + "/ca/" + s.ca.served
	}
	if f.intercept {
		if _, err := s.proxyURL(f); err != nil { // before a CA is looked for that there is not
			return nil, usage(err)
		}
	}
	if f.write {
		err = s.ca.read()
	}
	return s, err
}

// hostGrammar is what may stand for a host, with its port, in a file's path and
// between the quotes of TOML, JSON and YAML.
var hostGrammar = regexp.MustCompile(`^([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?$`)

// address is where clients reach the registry.
func (s *site) address(registry string) (*url.URL, error) {
	if registry == "" {
		registry = registryURL(s.cfg, s.cfg.Registry.Listen)
		host, _, err := net.SplitHostPort(s.cfg.Registry.Listen)
		s.guessed = err == nil && isUnspecified(host) && len(s.cfg.Registry.TLS.Hosts) == 0
	}
	u, err := url.Parse(registry)
	if err != nil || !hostGrammar.MatchString(u.Host) || u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("--registry %q is not an address such as https://mirror.example:5050", registry)
	}
	if strings.TrimSuffix(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
		return nil, fmt.Errorf("--registry %q has more than an address such as https://mirror.example:5050", registry)
	}
	if u.Scheme == "http" && s.cfg.Registry.TLS.Mode != config.TLSNone {
		return nil, fmt.Errorf("--registry %q is plain HTTP, and registry.tls.mode is %s: clients need https://", registry, s.cfg.Registry.TLS.Mode)
	}
	return &url.URL{Scheme: u.Scheme, Host: u.Host}, nil
}

// chosen are the upstreams to write about.
func (s *site) chosen(only []string) ([]string, error) {
	var all []string
	for name := range s.cfg.Upstreams {
		all = append(all, name)
	}
	slices.Sort(all)
	for _, name := range only {
		if !slices.Contains(all, name) {
			return nil, fmt.Errorf("--upstream %q is not one of upstreams: %s", name, strings.Join(all, ", "))
		}
	}
	if len(only) > 0 {
		return slices.Compact(slices.Sorted(slices.Values(only))), nil
	}
	return all, nil
}

// isLoopback tells whether only clients on the server's own machine reach it.
func (s *site) isLoopback() bool {
	ip, err := netip.ParseAddr(s.registry.Hostname())
	return s.registry.Hostname() == "localhost" || err == nil && ip.IsLoopback()
}

// notes are what holds for every client. login says how this one logs in.
func (s *site) notes(login string) []string {
	var n []string
	if s.cfg.Registry.Auth.Mode == config.AuthBasic {
		n = append(n, "This server wants a name and a password (registry.auth.mode: basic). "+login)
	}
	if s.cfg.Registry.Auth.Mode == config.AuthPassthrough {
		n = append(n, "Clients have here what they may have upstream (registry.auth.mode: passthrough). Many clients send a mirror no credentials, so that private images are not had in this way; the client's page says what was tried. With tidemark setup docker --intercept Docker has them.")
	}
	if s.guessed {
		n = append(n, fmt.Sprintf("%s is a guess: %s stands for every address of the server. Name the right one with --registry.", s.registry, s.cfg.Registry.Listen))
	}
	if s.registry.Scheme == "https" && s.ca == nil && s.cfg.Registry.TLS.Mode != config.TLSACME {
		n = append(n, "The client must trust the server's certificate. If it is not from a CA that the system knows, name that CA with --ca.")
	}
	if s.isLoopback() {
		n = append(n, fmt.Sprintf("Only clients on this machine reach %s. Others need registry.listen on another address, or --registry.", s.registry))
	}
	return n
}

// An authority is the certificate of a CA that clients must trust.
type authority struct {
	file   string // on this machine
	served string // address of it on the server, "" if it was named with --ca
	pem    []byte // read only for --write
}

func (a *authority) read() (err error) {
	if a.pem, err = os.ReadFile(a.file); err != nil {
		if a.served == "" {
			return usage(fmt.Errorf("--ca: %w", err))
		}
		return fmt.Errorf("the CA that clients must trust: %w\nthe server makes it when it starts, and serves it at %s: fetch it from there, and name the file with --ca", err, a.served)
	}
	if err := isCertificates(a.pem); err != nil {
		return fmt.Errorf("%s: %w", a.file, err)
	}
	return nil
}

// source says where to take it from, for somebody who copies it by hand.
func (a *authority) source() string {
	if a.served == "" {
		return a.file
	}
	return a.file + " on the server, which is also at " + a.served
}

// errNoCA reports a file without a certificate.
var errNoCA = errors.New("holds no PEM certificate")

// registryURL is where clients reach the registry that listens on addr.
func registryURL(cfg *config.Config, addr string) string {
	if cfg.Registry.TLS.Mode == config.TLSNone {
		return "http://" + clientAddr(cfg, addr)
	}
	return "https://" + clientAddr(cfg, addr)
}

// clientAddr is what clients call addr. An address that stands for all of a
// machine's is replaced by a name.
func clientAddr(cfg *config.Config, addr string) string {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return addr
	}
	if isUnspecified(host) {
		if host, err = os.Hostname(); err != nil {
			host = "localhost"
		}
		if len(cfg.Registry.TLS.Hosts) > 0 {
			host = cfg.Registry.TLS.Hosts[0]
		}
	}
	return net.JoinHostPort(host, port)
}

// isUnspecified tells whether a host stands for all addresses of a machine.
func isUnspecified(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "" || err == nil && ip.IsUnspecified()
}

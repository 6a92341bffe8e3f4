package main

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"tidemark/config"
)

func newSetup() *cobra.Command {
	c := &cobra.Command{
		Use:     "setup",
		Short:   "Print how to point a client at this server",
		Example: "  tidemark setup docker",
		Args:    cobra.NoArgs,
		RunE:    func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(newSetupDocker())
	return c
}

func newSetupDocker() *cobra.Command {
	var configPath, registry string
	c := &cobra.Command{
		Use:   "docker",
		Short: "Print what to write into Docker's configuration",
		Long: `Print what to write into Docker's daemon.json, so that pulls from Docker Hub go
through this server. Docker has no mirrors for other registries: their images
are pulled as SERVER/ghcr.io/org/app.`,
		Example: `  tidemark setup docker
  tidemark setup docker --registry https://mirror.example:5050`,
		Args: cobra.NoArgs,
	}
	c.Flags().StringVarP(&configPath, "config", "c", "", "configuration file of the server")
	c.Flags().StringVar(&registry, "registry", "", "address at which clients reach the registry, if it is another")
	c.RunE = func(c *cobra.Command, _ []string) error {
		cfg, err := loadConfig(configPath, nil)
		if err != nil {
			return err
		}
		if registry == "" {
			registry = registryURL(cfg, cfg.Registry.Listen)
		}
		u, err := url.Parse(registry)
		if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return usage(fmt.Errorf("--registry %q is not an address such as https://mirror.example:5050", registry))
		}
		printDocker(c, cfg, u)
		return nil
	}
	return c
}

func printDocker(c *cobra.Command, cfg *config.Config, u *url.URL) {
	w := c.OutOrStdout()
	fmt.Fprintf(w, `Put this into /etc/docker/daemon.json, beside what is there:

  { "registry-mirrors": ["%s"] }

and reload Docker, which needs no restart of containers:

  systemctl reload docker
`, strings.TrimSuffix(u.String(), "/"))
	if cfg.Registry.TLS.Mode == config.TLSInternal {
		fmt.Fprintf(w, `
Docker must trust the internal CA of this server:

  mkdir -p /etc/docker/certs.d/%[1]s
  cp %[2]s/tls/internal-ca.crt /etc/docker/certs.d/%[1]s/ca.crt
`, u.Host, strings.TrimSuffix(cfg.Data, "/"))
	}
	fmt.Fprintf(w, `
Images of other registries are pulled through it by name:

  docker pull %s/ghcr.io/org/app:1.0
`, u.Host)
}

// registryURL is where clients reach the registry that listens on addr. An
// address that stands for all of a machine's is replaced by a name.
func registryURL(cfg *config.Config, addr string) string {
	scheme := "https://"
	if cfg.Registry.TLS.Mode == config.TLSNone {
		scheme = "http://"
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return scheme + addr
	}
	if ip, err := netip.ParseAddr(host); host == "" || err == nil && ip.IsUnspecified() {
		if host, err = os.Hostname(); err != nil {
			host = "localhost"
		}
		if len(cfg.Registry.TLS.Hosts) > 0 {
			host = cfg.Registry.TLS.Hosts[0]
		}
	}
	return scheme + net.JoinHostPort(host, port)
}

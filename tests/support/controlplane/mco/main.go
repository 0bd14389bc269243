// mco runs the node and drain controllers of the Machine Config Operator against a kube-apiserver. The operator's
// machine-config-controller cannot be used as it is: it wants the whole of OpenShift around it.
//
//	mco --kubeconfig FILE --crds DIR    create the CRDs in DIR and wait until they are served
//	mco --kubeconfig FILE               run the controllers until SIGTERM
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	configv1 "github.com/openshift/api/config/v1"
	"github.com/openshift/api/features"
	configclient "github.com/openshift/client-go/config/clientset/versioned"
	configinformers "github.com/openshift/client-go/config/informers/externalversions"
	mcfgclient "github.com/openshift/client-go/machineconfiguration/clientset/versioned"
	mcfginformers "github.com/openshift/client-go/machineconfiguration/informers/externalversions"
	"github.com/openshift/library-go/pkg/operator/configobserver/featuregates"
	"github.com/openshift/machine-config-operator/pkg/controller/drain"
	"github.com/openshift/machine-config-operator/pkg/controller/node"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apiextensionsclient "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset"
	"k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	kubeinformers "k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/yaml"
)

// resync is longer than any test.
const resync = time.Hour

// established bounds the wait for one CRD.
const established = time.Minute

func main() {
	kubeconfig := flag.String("kubeconfig", "", "how to reach the API server, as cluster-admin")
	crds := flag.String("crds", "", "create the CRDs in this directory instead of running the controllers")
	updateDelay := flag.Duration("update-delay", 5*time.Second, "the controllers' delay between an event and their work")
	requeue := flag.Duration("drain-requeue-delay", time.Minute, "the delay between a failed drain and the next try")
	cordon := flag.Duration("cordon-backoff", 10*time.Second, "the first delay between two tries to cordon or uncordon")
	timeout := flag.Duration("drain-timeout", 90*time.Second, "how long one drain waits for evictions")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	config, err := clientcmd.BuildConfigFromFlags("", *kubeconfig)
	if err == nil {
		config.QPS, config.Burst = 200, 400
		if *crds != "" {
			err = create(ctx, config, *crds)
		} else {
			delays := drain.DefaultConfig()
			delays.UpdateDelay, delays.DrainRequeueDelay, delays.DrainHelperTimeout = *updateDelay, *requeue, *timeout
			delays.CordonOrUncordonBackoff.Duration = *cordon
			err = run(ctx, config, *updateDelay, delays)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "mco:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, config *rest.Config, delay time.Duration, delays drain.Config) error {
	config.UserAgent = "machine-config-controller"
	kube, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	mcfg, err := mcfgclient.NewForConfig(config)
	if err != nil {
		return err
	}
	openshift, err := configclient.NewForConfig(config)
	if err != nil {
		return err
	}
	gates := featuregates.NewHardcodedFeatureGateAccess([]configv1.FeatureGateName{
		features.FeatureGateOnClusterBuild, features.FeatureGatePinnedImages, features.FeatureGateMachineConfigNodes,
	}, nil)
	core := kubeinformers.NewSharedInformerFactory(kube, resync)
	mco := mcfginformers.NewSharedInformerFactory(mcfg, resync)
	cluster := configinformers.NewSharedInformerFactory(openshift, resync)
	nodes := node.NewWithCustomUpdateDelay(
		mco.Machineconfiguration().V1().ControllerConfigs(), mco.Machineconfiguration().V1().MachineConfigs(),
		mco.Machineconfiguration().V1().MachineConfigPools(), core.Core().V1().Nodes(), core.Core().V1().Pods(),
		mco.Machineconfiguration().V1().MachineOSConfigs(), cluster.Config().V1().Schedulers(),
		kube, mcfg, delay, gates,
	)
	drains := drain.New(
		delays, core.Core().V1().Nodes(), mco.Machineconfiguration().V1().MachineConfigPools(), kube, mcfg, gates,
	)
	core.Start(ctx.Done())
	mco.Start(ctx.Done())
	cluster.Start(ctx.Done())
	go nodes.Run(2, ctx.Done())
	go drains.Run(5, ctx.Done())
	<-ctx.Done()
	return nil
}

func create(ctx context.Context, config *rest.Config, directory string) error {
	client, err := apiextensionsclient.NewForConfig(config)
	if err != nil {
		return err
	}
	files, err := filepath.Glob(filepath.Join(directory, "*.yaml"))
	if err != nil {
		return err
	}
	if len(files) == 0 {
		return fmt.Errorf("no CRD in %s", directory)
	}
	crds := client.ApiextensionsV1().CustomResourceDefinitions()
	var names []string
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		crd := &apiextensionsv1.CustomResourceDefinition{}
		if err := yaml.UnmarshalStrict(text, crd); err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		if crd.Spec.Names.Kind == "MachineConfigNode" {
			alsoServeAlpha(crd)
		}
		if _, err := crds.Create(ctx, crd, metav1.CreateOptions{}); err != nil && !errors.IsAlreadyExists(err) {
			return fmt.Errorf("%s: %w", file, err)
		}
		names = append(names, crd.Name)
	}
	for _, name := range names {
		err := wait.PollUntilContextTimeout(ctx, 100*time.Millisecond, established, true, func(ctx context.Context) (bool, error) {
			crd, err := crds.Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				return false, err
			}
			for _, condition := range crd.Status.Conditions {
				if condition.Type == apiextensionsv1.Established && condition.Status == apiextensionsv1.ConditionTrue {
					return true, nil
				}
			}
			return false, nil
		})
		if err != nil {
			return fmt.Errorf("the CRD %s is not served: %w", name, err)
		}
	}
	return nil
}

// alsoServeAlpha adds the version that the controllers of this revision write; the CRD of today serves only v1. Both
// have the same fields as far as these controllers know them.
func alsoServeAlpha(crd *apiextensionsv1.CustomResourceDefinition) {
	for _, version := range crd.Spec.Versions {
		if version.Name == "v1" {
			alpha := version.DeepCopy()
			alpha.Name, alpha.Storage = "v1alpha1", false
			crd.Spec.Versions = append(crd.Spec.Versions, *alpha)
			return
		}
	}
}
